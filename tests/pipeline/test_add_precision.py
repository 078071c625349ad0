"""One precision more: the others stay as they were, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.pipeline.add_precision import add_precision
from qadtr_brevitas.pipeline.checkpoint import load_model
from qadtr_brevitas.quant import SwitchableModel, allowed_precisions, at_precision
from tests.evaluation.models import make_model_dir, train_split


def logits(model: SwitchableModel, bits: int) -> torch.Tensor:
    images, _ = train_split().batch(torch.arange(20))
    with torch.no_grad(), at_precision(model, bits):
        return model(images)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [(32, 4), (8,)])
def test_what_was_trained_computes_what_it_did(tmp_path: Path, trained: tuple[int, ...]) -> None:
    source = make_model_dir(tmp_path / "source", precisions=trained, recipe=False)
    add_precision(source, tmp_path / "wide", Precision(3, 3), train_split(), seed=0)
    (before, _), (after, info) = load_model(source), load_model(tmp_path / "wide")
    assert {p.weight for p in allowed_precisions(after)} == {32, *trained, 3}
    assert info.source == "calibrated at 3 bit"
    for bits in trained:
        assert torch.equal(logits(before, bits), logits(after, bits))
    # Three bits are near what more bits compute, and not the same.
    found, many = logits(after, 3), logits(after, max(trained))
    assert not torch.equal(found, many)
    assert (found.argmax(1) == many.argmax(1)).float().mean() > 0.5


@pytest.mark.slow
def test_a_precision_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    source = make_model_dir(tmp_path / "source", recipe=False)
    add_precision(source, tmp_path / "wide", Precision(4, 4), train_split(), seed=0)
    assert torch.equal(logits(load_model(source)[0], 4), logits(load_model(tmp_path / "wide")[0], 4))
