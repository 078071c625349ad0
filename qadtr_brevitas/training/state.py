"""What a run directory holds for resuming: the recipe the run was started with and one file of training state."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qadtr_brevitas.config import Recipe, load_recorded_recipe
from qadtr_brevitas.core.errors import CheckpointError, TrainingError, UsageError
from qadtr_brevitas.core.files import write_atomically
from qadtr_brevitas.pipeline.directories import (
    BEST_FOLDER,
    LAST_FOLDER,
    METRICS_FILE,
    RECIPE_FILE,
    STATE_FILE,
    STATE_FOLDER,
    TENSORBOARD_FOLDER,
    is_model_dir,
)

_VERSION = 1
_SHOWN_DIFFERENCES = 8


@dataclass
class RunCounters:
    """How far a run has come, in plain numbers. Besides them only weights and optimizer have to be restored.

    Args:
        step: optimizer steps done, over all phases.
        finished: whether the run is over and its final models are written.
        best: best mean accuracy over precisions on held-out training images so far.
        sums: sum and count of each logged figure since the epoch began.
    """

    step: int = 0
    finished: bool = False
    best: float | None = None
    sums: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingState:
    """Everything that an interrupted run resumes from.

    Args:
        counters: how far the run had come.
        phase: name of the phase the optimizer belongs to.
        processes: number of processes of the run.
        model: the model's `state_dict`.
        optimizer: the optimizer's `state_dict`.
        scaler: the gradient scaler's `state_dict`, with fp16 only.
        memory: what the attack keeps from step to step in each process, (processes, ...).
    """

    counters: RunCounters
    phase: str
    processes: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    memory: dict[str, Tensor] = field(default_factory=dict)


def save_state(run: Path, saved: TrainingState) -> None:
    """Write the training state of a run, atomically: an earlier state stays until the new one is on disk.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    content = {name: value for name, value in vars(saved).items() if name != "counters"}
    content |= {"state": asdict(saved.counters), "version": _VERSION}
    write_atomically(run / STATE_FILE, lambda path: torch.save(content, path))


def load_state(run: Path) -> TrainingState | None:
    """Read the training state of a run, on the CPU; None if there is none. No code in the file is ever run.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    path = run / STATE_FILE
    if not path.is_file():
        return None
    restart = f"start over with --resume never --overwrite, which deletes the run in {run}"
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = content.pop("version")
        if version != _VERSION:
            raise CheckpointError(f"{path} has version {version}, but this release reads version {_VERSION}; {restart}")
        counters = RunCounters(**content.pop("state"))
        return TrainingState(counters=counters, **content)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); {restart}") from error


def open_run(run: Path, recipe: Recipe, *, resume: Literal["auto", "never"], overwrite: bool) -> TrainingState | None:
    """Return the state that a run resumes from, or None where it starts anew; nothing is written.

    Raises:
        UsageError: the folder holds a run of another recipe (the keys that differ are named); or it holds a run,
            `resume` is never and `overwrite` is not set; or it holds a model that no run wrote; or `run` is a file.
        CheckpointError: the state of the run is damaged.
    """
    if run.exists() and not run.is_dir():
        raise UsageError(f"{run} is a file; choose another folder with -o")
    if is_model_dir(run):
        # Other commands would find that model instead of the run's own.
        raise UsageError(f"{run} is a model directory, not a run: choose another folder with -o")
    begun = (run / STATE_FILE).is_file() or (run / LAST_FOLDER).is_dir()
    # A recipe alone was left by a run that ended before it saved anything.
    if not begun or not (run / RECIPE_FILE).is_file() or (resume == "never" and overwrite):
        return None
    if resume == "never":
        raise UsageError(
            f"{run} already holds a run: choose another folder with -o, resume it with --resume auto, "
            "or delete it with --resume never --overwrite"
        )
    if differences := differing_keys(load_recorded_recipe(run / RECIPE_FILE), recipe):
        shown = ", ".join(differences[:_SHOWN_DIFFERENCES]) + (", ..." if differences[_SHOWN_DIFFERENCES:] else "")
        raise UsageError(
            f"{run} holds a run of another recipe; these keys differ: {shown}. Choose another folder with -o, "
            "or delete that run with --resume never --overwrite"
        )
    return load_state(run)


def start_run(run: Path, recipe: Recipe) -> None:
    """Delete what an earlier run left in the folder and write the recipe as resolved.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    # The recipe is deleted first: if this is interrupted, a folder without one is not a run.
    for name in (RECIPE_FILE, STATE_FOLDER, TENSORBOARD_FOLDER, LAST_FOLDER, BEST_FOLDER, METRICS_FILE):
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_atomically(run / RECIPE_FILE, lambda path: path.write_text(recipe.dump_yaml(), encoding="utf-8"))


def differing_keys(one: Recipe, other: Recipe) -> list[str]:
    """Return the dotted paths of the keys in which the results of two recipes may differ, sorted."""
    first, second = (
        dict(_flatten(recipe.model_dump(mode="json", exclude={"data": {"workers"}}))) for recipe in (one, other)
    )
    return sorted(key for key in {*first, *second} if first.get(key, ...) != second.get(key, ...))


def check_finite(model: nn.Module, step: int) -> None:
    """Check that no weight is NaN or infinite, so that training can resume from every saved state.

    Raises:
        TrainingError: a weight is not finite.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise TrainingError(
                f"after step {step} the weights {name} are not finite; the last good state is kept. "
                "Try a lower train.optimizer.lr, or train.clip_grad_norm=1"
            )


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
