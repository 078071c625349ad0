"""Whole runs with train.compile: they resume bit for bit, and learn what eager ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.device import has_compiler
from qadtr_brevitas.training.loop import train
from tests.training.support import Boom, Recorder, StopAt, explode, make_recipe, same_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_compiler("cpu"), reason="there is no C++ compiler"),
]

# One precision: each has a graph of its own.
SHORT: dict[str, Any] = {
    "epochs": 2,
    "float_epochs": 0,
    "scheduler": {"warmup_epochs": 0},
    "precision": {"schedule": "fixed", "choice": 4},
    "gradient": None,
    "regularizers": [],
    "norm_batches": 0,
}


@pytest.mark.parametrize("compiled", [True, "quantizers"])
def test_a_run_in_bfloat16_with_patches_resumes_bit_for_bit(compiled: bool | str, tmp_path: Path) -> None:
    torch.compiler.reset()
    recorder = Recorder()
    recipe = make_recipe(**SHORT, compile=compiled, amp="bf16")
    train(recipe, tmp_path / "whole", device="cpu", observer=recorder)
    with pytest.raises(Boom):
        train(recipe, tmp_path / "resumed", device="cpu", observer=StopAt(7, explode))
    train(recipe, tmp_path / "resumed", device="cpu")
    assert same_weights(tmp_path / "whole", tmp_path / "resumed")
    train(make_recipe(**SHORT, compile=compiled), tmp_path / "float32", device="cpu")
    assert not same_weights(tmp_path / "whole", tmp_path / "float32")
    # Patches are made while weights are frozen, by graphs of their own.
    passes = ["the passes of attacks at 4 bit", "the passes of training at 4 bit"] if compiled is True else []
    assert [message for passage in passes for message in recorder.messages if passage in message] == recorder.messages
    assert len(recorder.messages) == len(passes)


def with_images(recipe: Recipe, **counts: int) -> Recipe:
    """A recipe with other numbers of images."""
    content = recipe.model_dump()
    return Recipe.model_validate(
        {**content, "data": {**content["data"], "dataset": {**content["data"]["dataset"], **counts}}}
    )


@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_a_compiled_run_ends_as_accurate_as_an_eager_one(amp: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    # Dropout would draw other numbers.
    keys = {**SHORT, "epochs": 8, "attack": None, "drop": 0.0, "augment": "none", "amp": amp}
    accuracies: list[float] = []
    for compile_it in (True, False):
        recorder = Recorder()
        recipe = with_images(make_recipe(**keys, compile=compile_it), train_images=384, test_images=500)
        train(recipe, tmp_path / str(compile_it), device="cpu", observer=recorder)
        accuracies.append((recorder.epochs[-1].val_accuracy or {})["4"])
    # Three classes.
    assert min(accuracies) > 0.9
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.03)
