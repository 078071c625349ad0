"""Random numbers of each image's own."""

from __future__ import annotations

import torch

from qadtr_brevitas.attacks.image_streams import ImageStreams


def test_numbers_depend_on_seed_index_and_draws_only():
    whole, part = ImageStreams.of(3, range(10)), ImageStreams.of(3, [7, 2])
    for _ in range(3):
        assert torch.equal(whole.uniform(10, 2, 3)[[7, 2]], part.uniform(2, 2, 3))
    left = whole.subset(torch.tensor([7, 2]))
    assert torch.equal(left.uniform(2, 5), part.uniform(2, 5))
    assert torch.equal(whole.branch(4).uniform(10), ImageStreams.of(3, range(10)).branch(4).uniform(10))


def test_streams_differ():
    seeds, indices = torch.arange(5).tolist(), range(4)
    draws = [ImageStreams.of(seed, indices).uniform(4, 8) for seed in seeds]
    draws += [ImageStreams.of(0, indices).branch(number).uniform(4, 8) for number in range(5)]
    rows = torch.cat(draws)
    assert len(rows.unique(dim=0)) == len(rows)
    streams = ImageStreams.of(0, indices)
    assert not torch.equal(streams.uniform(4), streams.uniform(4))


def test_numbers_are_uniform_and_independent():
    drawn = ImageStreams.of(2**62, range(200)).uniform(200, 500)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn, 50, 0, 1)
    # Chi-square with 49 degrees of freedom stays below 100 but for one time in 10^4.
    assert ((counts - 2000) ** 2 / 2000).sum() < 100
    for first, second in ((drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1])):
        assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.015


def test_integers_take_every_value_alike():
    drawn = ImageStreams.of(1, range(100)).integers(-2, 3, 100, 400)
    assert drawn.dtype == torch.int64
    assert drawn.unique().tolist() == [-2, -1, 0, 1, 2]
    assert drawn.add(2).flatten().bincount().float().std() < 200
