from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.predict import placements, predict
from tests.evaluation.fakes import Reader, coded_split, white_patch


@given(side=st.integers(1, 8), seed=st.integers(0, 5), images=st.integers(1, 60))
def test_placements_are_inside_and_do_not_depend_on_the_number_of_images(side: int, seed: int, images: int) -> None:
    patch = white_patch(side=side).patch
    corners = placements(patch, images, (8, 10), seed=seed)
    assert corners.shape == (images, 2)
    assert bool((corners >= 0).all())
    assert bool((corners <= torch.tensor([8 - side, 10 - side])).all())
    assert torch.equal(corners, placements(patch, 60, (8, 10), seed=seed)[:images])


def test_placements_reach_every_place_equally_often() -> None:
    corners = placements(white_patch(side=6).patch, 9000, (8, 8), seed=0)
    counts = (corners[:, 0] * 3 + corners[:, 1]).bincount(minlength=9)
    assert counts.min() > 900
    assert counts.max() < 1100


def test_placements_keep_out_of_the_box_and_reach_the_rest() -> None:
    patch = replace(white_patch(side=3).patch, keep_out=(2, 2, 4, 4))
    corners = placements(patch, 4000, (8, 10), seed=0)
    rows, columns = corners.unbind(1)
    assert bool(((rows + 3 <= 2) | (rows >= 6) | (columns + 3 <= 2) | (columns >= 6)).all())
    assert len(corners.unique(dim=0)) == 2 * 6
    assert torch.equal(corners[:50], placements(patch, 50, (8, 10), seed=0))


def test_placements_differ_with_the_seed_and_not_with_the_texture() -> None:
    first, second = white_patch(side=3).patch, white_patch(side=3, target=None, precision=8).patch
    assert torch.equal(placements(first, 50, (8, 8), seed=1), placements(second, 50, (8, 8), seed=1))
    assert not torch.equal(placements(first, 50, (8, 8), seed=1), placements(first, 50, (8, 8), seed=2))


def test_fixed_place_is_kept() -> None:
    patch = white_patch(side=2, place=(6, 1)).patch
    assert placements(patch, 3, (8, 8), seed=0).tolist() == [[6, 1]] * 3


def test_patch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="9x9 patch is larger than the 8x8 image"):
        placements(white_patch(side=9).patch, 1, (8, 8), seed=0)
    with pytest.raises(UsageError, match="row 7, column 0"):
        placements(white_patch(side=2, place=(7, 0)).patch, 1, (8, 8), seed=0)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_predictions_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    split, model = coded_split(20), Reader()
    assert torch.equal(predict(model, split, batch_size=batch_size), split.labels)
    patched = predict(model, split, patch=white_patch().patch, batch_size=batch_size)
    assert patched.tolist() == [2] * 20


def test_predictions_leave_no_graph_and_no_mode_behind() -> None:
    predictions = predict(Reader(), coded_split(4))
    assert not predictions.is_inference()
    assert torch.is_grad_enabled()
