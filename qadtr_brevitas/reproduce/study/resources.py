"""What the steps of a study share while they run: the device, and models and images that are loaded once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch

from qadtr_brevitas.config.slots import slot_name
from qadtr_brevitas.core.device import resolve_device
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.files import fingerprint_facts
from qadtr_brevitas.core.plugin import plugin_settings
from qadtr_brevitas.data.base import Dataset
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.craft import divide_for_crafting
from qadtr_brevitas.evaluation.entries import LoadedModel, load_models
from qadtr_brevitas.pipeline.datasets import recorded_dataset
from qadtr_brevitas.reproduce.study.sections import Budget

_CACHED_MODELS, _CACHED_SPLITS = 5, 3

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Cache(Generic[_Value]):
    """The values that were made last; the oldest is dropped when there are too many.

    Args:
        size: the largest number of values.
    """

    size: int
    values: dict[Hashable, _Value] = field(default_factory=dict[Hashable, _Value])

    def get(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """Return the value of a key, made if it is not there."""
        if key not in self.values:
            while len(self.values) >= self.size:
                self.values.pop(next(iter(self.values)))
            self.values[key] = make()
        return self.values[key]


@dataclass(frozen=True)
class StudyResources:
    """Where and with what steps run.

    Args:
        work: the folder that studies share: runs, models, patches, cells.
        device_name: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        processes: processes of a training; torchrun starts them if there are several.
        command: command line, for reports.
        compiles: whether the passes of attacks run through torch.compile.
        report: called with messages about compilations; None for no messages.
    """

    work: Path
    device_name: str
    processes: int = 1
    command: str = ""
    compiles: bool = False
    report: Callable[[str], None] | None = None
    _models: Cache[LoadedModel] = field(default_factory=lambda: Cache[LoadedModel](_CACHED_MODELS))
    _splits: Cache[Split] = field(default_factory=lambda: Cache[Split](_CACHED_SPLITS))

    @property
    def device(self) -> torch.device:
        """The device."""
        return resolve_device(self.device_name)

    def load_model(self, folder: Path, name: str) -> LoadedModel:
        """Return the model of a run or model directory, under the name it has in the study."""
        return replace(self._models.get(folder, lambda: self._load(folder)), name=name)

    def _load(self, folder: Path) -> LoadedModel:
        compiling = self.report if self.compiles else None
        return load_models([folder], device=self.device, compiling=compiling)[0]

    def dataset(self, folder: Path) -> Dataset:
        """Return the data set that a model was made on.

        Raises:
            UsageError: the model does not record it.
        """
        if (dataset := recorded_dataset(folder)) is not None:
            return dataset
        raise UsageError(
            f"the model in {folder} does not record the data set it was made on: make it again with `qadtr-brevitas "
            "train` or `convert`"
        )

    def images(self, folder: Path, split: Literal["train", "test"], *, limit: int | None, seed: int) -> Split:
        """Return at most `limit` images of the data set that a model was made on, balanced over the classes."""
        dataset = self.dataset(folder)
        key = fingerprint_facts([slot_name(dataset), plugin_settings(dataset), split, limit, seed])
        return self._splits.get(key, lambda: dataset.load(split, limit=limit, seed=seed))

    def patch_images(self, folder: Path, budget: Budget) -> tuple[Split, Split]:
        """Return training images to make patches on and held-out images to choose them on, as the budget says.

        Of a data set with fewer images, at most a fifth is held out.
        """
        split = self.images(folder, "train", limit=budget.patch_images + budget.held_out, seed=budget.seed)
        return divide_for_crafting(split, seed=budget.seed, max_train=budget.patch_images, max_held_out=budget.held_out)

    def test_images(self, folder: Path, budget: Budget) -> Split:
        """Return the test images that everything is scored on."""
        limit = None if budget.images == "all" else budget.images
        return self.images(folder, "test", limit=limit, seed=budget.seed)
