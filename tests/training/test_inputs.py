from typing import Any

import pytest
import torch

from qadtr_brevitas.data.split import Split
from qadtr_brevitas.training.inputs import NormBatches, TrainingInputs
from tests.training.support import make_recipe

CPU = torch.device("cpu")


def make_split() -> Split:
    split: Split = make_recipe().data.dataset.load("train")
    return split


def inputs(rank: int = 0, processes: int = 1, **keys: Any) -> TrainingInputs:
    return TrainingInputs(make_recipe(**keys), make_split(), rank, processes, CPU)


def test_an_epoch_visits_every_image_once() -> None:
    split, source = make_split(), inputs(augment="none")
    seen = torch.cat([source.batch(step, steps_per_epoch=6)[0] for step in range(6)])
    whole, _ = split.batch(torch.arange(len(split)))
    assert sorted(seen.flatten(1).sum(1).tolist()) == sorted(whole.flatten(1).sum(1).tolist())
    other = torch.cat([source.batch(step, steps_per_epoch=6)[0] for step in range(6, 12)])
    assert not torch.equal(seen, other)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batch_of_one(processes: int) -> None:
    images, labels = inputs(augment="none").batch(3, steps_per_epoch=6)
    shares = [inputs(rank, processes, augment="none").batch(3, steps_per_epoch=6) for rank in range(processes)]
    together = torch.stack([share[0] for share in shares], dim=1).flatten(0, 1)
    assert torch.equal(together, images)
    assert torch.equal(torch.stack([share[1] for share in shares], dim=1).flatten(), labels)


def test_augmentation_depends_on_seed_step_and_rank_only() -> None:
    first, _ = inputs().batch(3, steps_per_epoch=6)
    assert torch.equal(first, inputs().batch(3, steps_per_epoch=6)[0])
    assert not torch.equal(first, inputs(augment="none").batch(3, steps_per_epoch=6)[0])
    one, other = (inputs(rank, 2).batch(3, steps_per_epoch=6)[0] for rank in range(2))
    assert not torch.equal(one, other)


def test_norm_batches_are_augmented_whole_and_the_same_every_time() -> None:
    batches = NormBatches(make_recipe(norm_batches=4), make_split(), CPU)
    assert [batch.shape for batch in batches] == [(16, 3, 8, 8)] * 4
    assert all(torch.equal(one, other) for one, other in zip(batches, batches, strict=True))
    plain = NormBatches(make_recipe(norm_batches=4, augment="none"), make_split(), CPU)
    assert not torch.equal(batches[0], plain[0])
    assert not torch.equal(plain[0], plain[1])


def test_norm_batches_are_no_more_than_the_images_fill() -> None:
    assert len(NormBatches(make_recipe(norm_batches=50, batch_size=40), make_split(), CPU)) == 2
    assert len(NormBatches(make_recipe(norm_batches=0), make_split(), CPU)) == 0
