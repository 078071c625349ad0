"""What a run tells its user at the start, where it is not obvious."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.device import missing_compiler
from qadtr_brevitas.pipeline.build import own_classes
from qadtr_brevitas.pipeline.checkpoint import ModelInfo
from qadtr_brevitas.training.state import TrainingState


def start_messages(
    run: Path, recipe: Recipe, info: ModelInfo, saved: TrainingState | None, *, processes: int, device: torch.device
) -> Iterator[str]:
    """Yield sentences about what a run starts from, and what it costs.

    Args:
        run: its directory.
        recipe: of the run.
        info: of its model.
        saved: the state that it resumes from; None at the start.
        processes: of the run.
        device: of this process.
    """
    if recipe.train.compile and (missing := missing_compiler(device)):
        yield f"training is not compiled as train.compile asks for: {missing}"
    if saved is None:
        if cost := recipe.train.mask_search_cost:
            yield cost
        weights, count = own_classes(recipe.model), info.num_classes
        if recipe.model.pretrained and weights != count:
            yield f"the classifier is initialized anew for {count} classes: the weights are for {weights}"
        return
    yield f"resuming {run} after step {saved.counters.step}"
    if saved.processes != processes:
        yield (
            f"the run was started with {saved.processes} processes and resumes with {processes}: its weights will "
            "differ slightly from those of an uninterrupted run"
        )
