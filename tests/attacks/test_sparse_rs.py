import pytest
import torch
from pydantic import ValidationError

from qadtr_brevitas.attacks.per_image import PatchTask
from qadtr_brevitas.attacks.relocation import AllowedCorners
from qadtr_brevitas.attacks.results import AttackGoal
from qadtr_brevitas.attacks.sparse_rs import GeneratorDraws, RandomSearch, SparseRs
from qadtr_brevitas.core.seeding import generator
from tests.attacks.support import accuracy, attacked, sample, spy, target_rate

BLIND = torch.tensor([1.0, 0.0])
"""Logits that say nothing about the image."""


def light(images):
    """Loss of both classes by brightness: it can always fall a little further, and success is out of reach."""
    score = images.mean((1, 2, 3))
    return torch.stack([10 - score, score], 1)


def run(model, *, count=20, seed=0, **fields):
    images, labels = torch.zeros(count, 3, 16, 16), torch.zeros(count, dtype=torch.long)
    return SparseRs(**{"size": 4, "queries": 100, **fields}).run(model, images, labels, generator=generator(seed))


def search(*, queries, size=20, image_size=64, alpha=0.4, count=1, model=light):
    images, labels = torch.zeros(count, 3, image_size, image_size), torch.zeros(count, dtype=torch.long)
    mask = torch.ones(size, size, dtype=torch.bool)
    task = PatchTask(model=model, images=images, mask=mask, goal=AttackGoal.of(None, labels, loss="margin"))
    allowed_corners = AllowedCorners.outside(None, (image_size, image_size), (size, size))
    return RandomSearch(
        task=task,
        draw_corners=lambda: torch.full((count, 2), 6),
        allowed_corners=allowed_corners,
        queries=queries,
        alpha=alpha,
        move_every=4,
        draws=GeneratorDraws(generator(0), torch.device("cpu")),
    )


@pytest.mark.parametrize("queries", [10_000, 1_000])
def test_changes_shrink_as_in_the_official_code(queries):
    few, scale = search(queries=queries), 10_000 // queries
    expected = {0: 12, 10: 12, 11: 8, 51: 6, 201: 4, 501: 3, 1001: 2, 2001: 1, 9999: 1}
    if scale > 1:
        # Rescaled to the budget: a query counts for ten.
        expected = {0: 12, 10: 12, 20: 8, 60: 6, 210: 4, 510: 3, 1010: 2, 2010: 1, 9990: 1}
    assert {query: few.sides(query // scale)[0] for query in expected} == expected


def test_single_channels_change_from_half_way_through_single_pixels():
    assert search(queries=10_000).single_channels_from == 2001 + 7999 // 2


def test_a_larger_alpha_changes_more():
    assert search(queries=1000, alpha=0.9).sides(0) == (18, 18)


def test_no_image_gets_more_than_its_queries():
    seen = []
    run(spy(light, seen), queries=57)
    assert [len(images) for images in seen] == [20] * 57


def test_a_broken_image_costs_no_further_queries(toy):
    seen = []
    images = attacked(toy, SparseRs(size=5, queries=120), model=spy(toy.model, seen))
    sizes = [len(batch) for batch in seen]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= 100 * accuracy(toy, images) + 2


def test_the_search_ends_when_all_images_are_broken():
    seen = []
    run(spy(lambda images: torch.stack([images.mean((1, 2, 3)) - 1, torch.zeros(len(images))], 1), seen))
    assert len(seen) == 1


def test_every_fourth_query_moves_the_patch_and_the_others_change_it():
    seen = []
    # A model that likes every patch alike: nothing is kept, each query is seen apart.
    search(queries=40, size=4, image_size=16, count=30, model=spy(lambda images: torch.ones(30, 1) * BLIND, seen)).run()
    for query, images in enumerate(seen[:37]):
        moved = query % 4 == 0 and query > 0
        assert bool((images[:, :, :6] != 0).any()) == moved
        if moved:
            assert torch.equal(images.sum((1, 2, 3)), seen[0].sum((1, 2, 3)))


@pytest.mark.slow
def test_moves_get_shorter():
    seen = []
    search(
        queries=400, size=4, image_size=32, count=60, model=spy(lambda images: torch.ones(60, 1) * BLIND, seen)
    ).run()
    lowest = [(torch.arange(32.0)[:, None] * (seen[query] != 0).any(1)).max() for query in (4, 200, 380)]
    assert lowest[0] > lowest[1] > lowest[2] > 9


def test_a_patch_at_a_fixed_place_stays_there():
    seen = []
    run(spy(light, seen), place=(3, 9))
    covered = (torch.cat(seen) != 0).any(1).any(0)
    assert covered[3:7, 9:13].all()
    assert covered.sum() == 16


def test_patches_keep_out_of_a_box():
    seen = []
    run(spy(light, seen), keep_out=(0, 0, 16, 8), count=60)
    covered = (torch.cat(seen) != 0).any(1).any(0)
    assert not covered[:, :8].any()
    assert covered[:, 8:].all()


def test_every_place_can_be_reached_the_last_row_and_column_included():
    """The official code draws starts short of the last row and column."""
    seen = []
    run(spy(light, seen), queries=1, count=3000)
    covered = (seen[0] != 0).any(1).any(0)
    assert covered[15].any()
    assert covered[:, 15].any()


def test_only_changes_that_lower_the_loss_are_kept():
    seen = []
    images = run(spy(light, seen), queries=300)
    loss = torch.stack([batch.mean((1, 2, 3)) for batch in seen])
    torch.testing.assert_close(images.mean((1, 2, 3)), loss.max(0).values)
    assert images.mean() > 1.4 * seen[0].mean()


def test_colors_are_full_or_none():
    assert set(run(light).unique().tolist()) == {0.0, 1.0}


def test_the_start_is_made_of_squares():
    """Neighbors have the same color far more often than one time in eight."""
    start = search(queries=10, size=16, count=10)._start()
    same = (start[:, :, :, 1:] == start[:, :, :, :-1]).all(1).float().mean()
    assert same > 0.4
    assert len(start.flatten(2).transpose(1, 2).reshape(-1, 3).unique(dim=0)) == 8


@pytest.mark.slow
def test_more_queries_do_more(toy):
    few, many = (accuracy(toy, attacked(toy, SparseRs(size=4, queries=queries))) for queries in (10, 200))
    assert many < few - 0.3


@pytest.mark.parametrize("loss", ["logits", "cross-entropy", "margin"])
def test_every_loss_raises_the_target(toy, loss):
    images = attacked(toy, SparseRs(size=5, queries=300, target=2, loss=loss), count=60)
    assert target_rate(toy, images, 2) > 0.5


def test_it_runs_without_gradients(toy):
    """A network that rounds its input has no gradient; its outputs betray it all the same."""
    images, labels = sample(toy, 60)
    patched = SparseRs(size=5, queries=200).run(
        lambda images: toy.model((images * 255).round() / 255), images, labels, generator=generator(0)
    )
    assert accuracy(toy, patched) < 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"queries": 0}, "greater than or equal to 1"),
        ({"alpha": 1.5}, "less than or equal to 1"),
        ({"move_every": 1}, "greater than or equal to 2"),
        ({"loss": "hinge"}, "loss"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValidationError, match=message):
        SparseRs(**fields)
