"""The only judge of success: patches x models x precisions, on the same images at the same places.

Each finished cell is on disk, so that a killed evaluation goes on where it stopped. Every geometry also gets a patch of
noise as control: what a patch does by merely covering pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.cells import CellKey, CellStore
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.fingerprints import fingerprint_tensors
from qadtr_brevitas.metrics import accuracy, score
from qadtr_brevitas.precision import Precision, PrecisionLike
from qadtr_brevitas.predict import placements, predict
from qadtr_brevitas.quant import at_precision, frozen_weights, precisions_or_all
from qadtr_brevitas.report import AttackCell, CleanCell, DataFacts, ModelFacts, Rate, Report, Threat, versions
from qadtr_brevitas.seeding import generator
from qadtr_brevitas.subjects import Contender, Subject

CELL_FOLDER = "cells"

Transfer: TypeAlias = Literal["all", "float", "none"]
"""Which patches are moved to models and precisions they were not made on: all, those made at 32 bit, or none."""

Progress: TypeAlias = Callable[[int, int, str], object]
"""Is told finished cells, all cells, and what the last one was."""


def evaluate(
    subjects: Sequence[Subject],
    patches: Sequence[Contender],
    split: Split,
    *,
    output: Path,
    data_name: str,
    data_settings: dict[str, Any] | None = None,
    available: int | None = None,
    precisions: Sequence[PrecisionLike] | None = None,
    transfer: Transfer = "all",
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    command: str = "",
    progress: Progress | None = None,
) -> Report:
    """Scores every patch, and a control of noise for each geometry, on every model at every precision.

    Args:
        subjects: the models; they are moved to the device and put in eval mode.
        patches: the patches; none gives clean accuracies only.
        split: the images and labels.
        output: folder that keeps the finished cells, in `cells/`.
        data_name: name of the data set, for the report.
        data_settings: its settings, for the report.
        available: how many images the whole test split has; None if `split` is all of it.
        precisions: precisions to attack; None for all that a model allows.
        transfer: which patches to move; white-box cells and controls are always scored.
        seed: seed of the placements and of the controls.
        batch_size: images in one forward pass.
        device: where the models run.
        command: command line, for the report.
        progress: told after each cell.

    Raises:
        UsageError: a precision that a model does not allow, a patch that does not fit the images, a target that is no
            class, or two models or patches of one name.
        DataError: a model is for other images or another number of classes.
        CheckpointError: a cell cannot be written.
    """
    contenders = [*patches, *controls(patches, seed=seed)]
    for subject in subjects:
        subject.check_data(split, data=data_name)
    _check(subjects, contenders, split, seed=seed)
    grid = {subject.name: precisions_or_all(subject.model, precisions) for subject in subjects}
    plan = {
        (subject.name, precision): [c for c in contenders if _is_wanted(c, subject, precision, transfer)]
        for subject in subjects
        for precision in grid[subject.name]
    }
    counter = _Counter(len(plan) + sum(map(len, plan.values())), progress)
    data = _data_facts(split, name=data_name, settings=data_settings or {}, available=available)
    run = _Run(
        split, CellStore(output / CELL_FOLDER), data.fingerprint, seed, batch_size, torch.device(device), counter
    )
    clean: list[CleanCell] = []
    cells: list[AttackCell] = []
    for subject in subjects:
        steps = {precision: plan[subject.name, precision] for precision in grid[subject.name]}
        for precision, base, patched in run.predictions(subject, steps):
            facts = {"model": subject.name, "precision": str(precision)}
            clean.append(CleanCell(**facts, accuracy=Rate.of(accuracy(base, split.labels))))
            for contender, predictions in zip(steps[precision], patched, strict=True):
                threat = _threat(contender, subject, precision)
                for target in _targets(contender, patches):
                    result = score(base, predictions, split.labels, target=target)
                    cells.append(AttackCell.of(result, **facts, patch=contender.name, target=target, threat=threat))
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=versions(),
        seed=seed,
        device=str(device),
        data=data,
        models=tuple(_model_facts(subject, grid[subject.name]) for subject in subjects),
        patches=tuple(contender.facts for contender in contenders),
        clean=tuple(clean),
        cells=tuple(cells),
    )


def controls(patches: Sequence[Contender], *, seed: int) -> list[Contender]:
    """A patch of uniform noise, on the 8-bit grid, for each size, shape and place among the patches."""
    found: dict[str, Contender] = {}
    for contender in patches:
        patch, geometry = contender.patch, contender.facts.geometry
        if geometry in found:
            continue
        noise = torch.randint(256, patch.texture.shape, generator=generator(seed, "control", geometry)) / 255
        height, width = patch.size
        same_size = sum(other.patch.size == patch.size for other in found.values())
        name = f"noise {height}x{width}" + (f" ({same_size + 1})" if same_size else "")
        control = Patch(texture=noise, mask=patch.mask, place=patch.place, meta={"attack": "noise"})
        found[geometry] = Contender(name, control, control=True)
    return list(found.values())


@dataclass
class _Counter:
    """Counts finished cells for the progress callback."""

    total: int
    progress: Progress | None
    done: int = 0

    def step(self, note: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, note)


@dataclass(frozen=True)
class _Run:
    """One evaluation's images and settings."""

    split: Split
    store: CellStore
    data: str
    seed: int
    batch_size: int
    device: torch.device
    counter: _Counter

    def predictions(
        self, subject: Subject, plan: Mapping[Precision, Sequence[Contender]]
    ) -> Iterator[tuple[Precision, Tensor, list[Tensor]]]:
        """For each precision the clean predictions and those with each of its patches."""
        subject.model.to(self.device).eval()
        with frozen_weights(subject.model):
            for precision, contenders in plan.items():
                with at_precision(subject.model, precision):
                    clean = self._cell(subject, precision, None)
                    yield precision, clean, [self._cell(subject, precision, patch) for patch in contenders]

    def _cell(self, subject: Subject, precision: Precision, contender: Contender | None) -> Tensor:
        key = CellKey(subject.fingerprint, str(precision), self.data)
        if contender is not None:
            key = CellKey(subject.fingerprint, str(precision), self.data, contender.facts.fingerprint, self.seed)
        compute = partial(
            predict,
            subject.model,
            self.split,
            patch=contender.patch if contender else None,
            seed=self.seed,
            batch_size=self.batch_size,
            device=self.device,
        )
        predictions = self.store.get(key, compute, images=len(self.split))
        self.counter.step(f"{subject.name} at {precision} bit, {contender.name if contender else 'clean'}")
        return predictions


def _check(subjects: Sequence[Subject], contenders: Sequence[Contender], split: Split, *, seed: int) -> None:
    for kind, names in (("models", [s.name for s in subjects]), ("patches", [c.name for c in contenders])):
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"two {kind} are called {repeated[0]!r}: give each a name of its own")
    for contender in contenders:
        try:
            placements(contender.patch, 1, split.image_size, seed=seed)
        except UsageError as error:
            raise UsageError(f"patch {contender.name!r}: {error}") from error
        target = contender.facts.target
        if target is not None and not 0 <= target < len(split.classes):
            raise UsageError(
                f"patch {contender.name!r} aims at class {target}, the data set has {len(split.classes)} classes: "
                "choose the data set it was made on with --data"
            )


def _targets(contender: Contender, patches: Sequence[Contender]) -> list[int | None]:
    """What a patch is scored for; a control is scored for the aims of all patches of its geometry."""
    if not contender.control:
        return [contender.facts.target]
    alike = [patch.facts.target for patch in patches if patch.facts.geometry == contender.facts.geometry]
    return list(dict.fromkeys(alike))


def _is_wanted(contender: Contender, subject: Subject, precision: Precision, transfer: Transfer) -> bool:
    if transfer == "all" or _threat(contender, subject, precision) != "transfer":
        return True
    source = contender.facts.source
    return transfer == "float" and source is not None and Precision.parse(source.precision).is_float


def _threat(contender: Contender, subject: Subject, precision: Precision) -> Threat:
    if contender.control:
        return "control"
    source = contender.facts.source
    if source and (source.fingerprint, source.precision) == (subject.fingerprint, str(precision)):
        return "white-box"
    return "transfer"


def _data_facts(split: Split, *, name: str, settings: dict[str, Any], available: int | None) -> DataFacts:
    return DataFacts(
        name=name,
        settings=settings,
        images=len(split),
        available=len(split) if available is None else available,
        image_size=split.image_size,
        classes=split.classes,
        fingerprint=fingerprint_tensors([split.images, split.labels]),
    )


def _model_facts(subject: Subject, precisions: Sequence[Precision]) -> ModelFacts:
    return ModelFacts(
        name=subject.name,
        path=subject.path,
        fingerprint=subject.fingerprint,
        architecture=subject.info.name,
        settings=dict(subject.info.quant),
        source=subject.info.source,
        precisions=tuple(map(str, precisions)),
    )
