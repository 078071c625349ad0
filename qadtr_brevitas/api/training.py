"""`train`: a recipe to a run directory, from Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from qadtr_brevitas.config import Recipe, load_recipe
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.exporting import check_for_target
from qadtr_brevitas.pipeline.checkpoint import load_model
from qadtr_brevitas.pipeline.directories import METRICS_FILE
from qadtr_brevitas.quant import SwitchableModel
from qadtr_brevitas.training.log import TrainingObserver
from qadtr_brevitas.training.loop import train as train_recipe


@dataclass(frozen=True)
class Run:
    """A run directory.

    Args:
        path: the directory; `attack`, `evaluate` and `export` take it too.
        recipe: what was trained.
    """

    path: Path
    recipe: Recipe

    def model(self, *, device: str = "cpu") -> SwitchableModel:
        """Load the trained model, in eval mode."""
        return load_model(self.path, device=device)[0]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What was logged for each step and epoch: the lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / METRICS_FILE).read_text(encoding="utf-8").splitlines()]

    @property
    def accuracy(self) -> dict[str, float]:
        """Accuracy of the finished model by precision, as the last validation measured it."""
        validated = [record["val_accuracy"] for record in self.metrics if record.get("val_accuracy")]
        return validated[-1] if validated else {}


def train(
    recipe: str | Path | Recipe,
    output: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    resume: Literal["auto", "never"] = "auto",
    overwrite: bool = False,
    observer: TrainingObserver | None = None,
    device: str = "auto",
) -> Run:
    """Train a switchable model by a recipe; an interrupted run resumes with the same call.

    Args:
        recipe: name of a shipped recipe, `RECIPE+DEFENSE`, a YAML file, or a recipe that was loaded before.
        output: the run directory.
        overrides: recipe keys by dotted path, as `{"train.epochs": 3, "train.gradient": None}`.
        resume: `auto` resumes a run of the same recipe in the directory; `never` refuses one.
        overwrite: with `never`, delete the run in the directory first.
        observer: called after steps and epochs, and with messages.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        UsageError: the directory holds another run, or the recipe does not fit model, data or device.
        RecipeError: something is wrong in the recipe or the overrides; the error lists all of it.
        ExportError: the compiler that `quant.target` names cannot take the network; nothing is trained.
        TrainingError: the loss is no longer finite.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise UsageError("overrides change a recipe file: give the recipe's name or file, or drop overrides=")
        checked = recipe
    else:
        checked = load_recipe(recipe, [f"{key}={json.dumps(value)}" for key, value in (overrides or {}).items()])
    check = partial(check_for_target, target=checked.quant.target)
    run = train_recipe(
        checked, output, resume=resume, overwrite=overwrite, observer=observer, device=device, check=check
    )
    return Run(run, checked)
