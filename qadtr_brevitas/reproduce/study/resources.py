"""What the parts of a study share while they are made: device, data and models that are loaded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import TypeAdapter

from qadtr_brevitas.config import load_recorded_recipe
from qadtr_brevitas.config.slots import Slot, slot_name
from qadtr_brevitas.core.device import resolve_device
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.files import fingerprint_facts
from qadtr_brevitas.core.registry import DATASETS
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel, load_subjects
from qadtr_brevitas.pipeline.checkpoint import read_info
from qadtr_brevitas.reproduce.study.sections import Budget

_DATASET: TypeAdapter[Any] = TypeAdapter(Annotated[Any, Slot(DATASETS)])
_MOST_KEPT = 8
# Runs of earlier releases say in their recipe only what they were made on.
RECIPE_FILE = "recipe.yaml"

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class StudyResources:
    """Where and with what parts are made.

    Args:
        work: folder of everything that studies share: runs, models, patches, cells.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        processes: processes of a training, started by torchrun where there are several.
        command: command line, for reports.
    """

    work: Path
    device: str
    processes: int = 1
    command: str = ""
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> torch.device:
        """The device."""
        return resolve_device(self.device)

    def loaded(self, folder: Path, name: str) -> LoadedModel:
        """The model of a run or model directory, under the name it has in the study."""
        return replace(self._kept(f"model {folder}", lambda: load_subjects([folder], device=self.where)[0]), name=name)

    def dataset(self, folder: Path) -> Any:
        """The data set that a model was made on.

        Raises:
            UsageError: the model does not say.
        """
        made_on = read_info(folder).data
        if made_on is None and (folder / RECIPE_FILE).is_file():
            return load_recorded_recipe(folder / RECIPE_FILE).data.dataset
        if made_on is None:
            raise UsageError(
                f"the model in {folder} does not say which data set it was made on: make it anew with `qadtr-brevitas "
                "train` or `convert`, which keep it"
            )
        return _DATASET.validate_python(dict(made_on))

    def images(self, folder: Path, split: Literal["train", "test"], *, limit: int | None, seed: int) -> Split:
        """At most so many images of the data set that a model was made on, balanced over the classes."""
        dataset = self.dataset(folder)
        key = fingerprint_facts([slot_name(dataset), settings_of(dataset), split, limit, seed])
        return self._kept(f"images {key}", lambda: dataset.load(split, limit=limit, seed=seed))

    def patch_images(self, folder: Path, budget: Budget) -> tuple[Split, Split]:
        """Training images to make patches on, and others to choose them on; fewer where there are not so many."""
        wanted = budget.patch_images + budget.held_out
        split = self.images(folder, "train", limit=wanted, seed=budget.seed)
        judged = min(budget.held_out, max(1, len(split) // 5))
        judge, rest = split.divide(judged, seed=budget.seed)
        return rest.balanced(min(budget.patch_images, len(rest)), seed=budget.seed), judge

    def test_images(self, folder: Path, budget: Budget) -> Split:
        """The test images that everything is scored on."""
        limit = None if budget.images == "all" else budget.images
        return self.images(folder, "test", limit=limit, seed=budget.seed)

    def _kept(self, key: str, make: Callable[[], _Item]) -> _Item:
        if key not in self.kept:
            while len(self.kept) >= _MOST_KEPT:
                self.kept.pop(next(iter(self.kept)))
            self.kept[key] = make()
        return self.kept[key]


def settings_of(plugin: Any) -> dict[str, Any]:
    """A plug-in's fields as JSON values."""
    return TypeAdapter(type(plugin)).dump_python(plugin, mode="json")
