"""The parts that make patches, and those that put networks through attacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qadtr_brevitas.auditing import audit
from qadtr_brevitas.auditing.tables import write_audits
from qadtr_brevitas.config.slots import slot_name
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.evaluation import Grid, NamedAttack, compute, make_report
from qadtr_brevitas.evaluation.cells import CellStore
from qadtr_brevitas.evaluation.craft import CraftSetup, craft
from qadtr_brevitas.evaluation.entries import LoadedModel, NamedPatch, load_patches
from qadtr_brevitas.evaluation.report.files import write_report
from qadtr_brevitas.evaluation.report.gallery import draw_pictures
from qadtr_brevitas.evaluation.unseen import other_targets
from qadtr_brevitas.quant.inference import InferenceMode
from qadtr_brevitas.reproduce.analyses import AnalysisData, run_analysis
from qadtr_brevitas.reproduce.study.resources import StudyResources, settings_of
from qadtr_brevitas.reproduce.study.sections import Budget, StudyAudit, StudyEvaluation
from qadtr_brevitas.reproduce.study.steps import StudyStep

CELLS = "cells"


@dataclass(frozen=True)
class PatchStep(StudyStep):
    """The patches of one attack on one network at one precision, one for each target.

    Args:
        label: what reports call the attack.
        source: the network's name.
        model: its folder.
        attack: the attack.
        mode: the precision, or several together.
        targets: classes to aim at.
        elsewhere: aim at as many other classes instead.
        budget: images and seed.
    """

    label: str
    source: str
    model: Path
    attack: Any
    mode: InferenceMode
    targets: tuple[int | None, ...]
    elsewhere: bool
    budget: Budget

    def work(self, resources: StudyResources, progress: Progress) -> None:
        """Makes those that are missing."""
        train, judge = resources.patch_images(self.model, self.budget)
        dataset = resources.dataset(self.model)
        classes = len(train.classes)
        targets = other_targets(self.targets, classes) if self.elsewhere else self.targets
        setup = CraftSetup(
            train=train,
            held_out=judge,
            output=self.folder,
            data={"name": slot_name(dataset), "settings": settings_of(dataset)},
            seed=self.budget.seed,
            batch_size=self.budget.batch_size,
            device=resources.where,
            progress=progress,
        )
        loaded = resources.loaded(self.model, self.source)
        craft(loaded, self.attack, setup, name=slot_name(self.attack), precisions=[self.mode], targets=targets)

    def patch_entries(self) -> Iterator[NamedPatch]:
        """The patches, by the names that the study gives them."""
        for found in load_patches([self.folder]):
            target = found.patch.meta.get("target")
            aim = "untargeted" if target is None else f"to {target}"
            source = replace(found.patch, meta={**found.patch.meta, "model": self.source})
            yield replace(found, name=f"{self.label} on {self.source} at {self.mode} {aim}", patch=source)


@dataclass(frozen=True)
class EvaluationStep(StudyStep):
    """One network under the attacks of one evaluation, with a report of its own.

    Args:
        row: what the report calls the network.
        model: its folder.
        scored: what it is scored at.
        evaluation: the evaluation.
        patches: the patches it meets.
        attacks: attacks on each image.
        surrogates: names and folders of networks that these are made on as well.
        budget: images and seed.
    """

    row: str
    model: Path
    scored: tuple[InferenceMode, ...]
    evaluation: StudyEvaluation
    patches: tuple[PatchStep, ...]
    attacks: tuple[NamedAttack, ...]
    surrogates: tuple[tuple[str, Path], ...]
    budget: Budget

    def work(self, resources: StudyResources, progress: Progress) -> None:
        """Computes the cells that are missing from those of all studies, and writes the report."""
        patches = [patch_entry for part in self.patches for patch_entry in part.patch_entries()]
        grid = self._grid(resources, patches)
        store = CellStore(resources.work / CELLS)
        compute(grid.jobs(), store, device=resources.where, progress=progress)
        report = make_report(grid, store, device=str(resources.where), command=resources.command)
        pictures: Sequence[Path] = []
        if self.budget.pictures:
            self.folder.mkdir(parents=True, exist_ok=True)
            pictures = draw_pictures(
                report, grid.loaded_models, patches, grid.split, folder=self.folder, device=resources.where
            )
        write_report(report, self.folder, pictures=pictures)

    def _grid(self, resources: StudyResources, patches: Sequence[NamedPatch]) -> Grid:
        dataset = resources.dataset(self.model)
        split = resources.test_images(self.model, self.budget)
        surrogates: list[LoadedModel] = [resources.loaded(folder, name) for name, folder in self.surrogates]
        return Grid(
            loaded_models=[resources.loaded(self.model, self.row)],
            patches=patches,
            split=split,
            data_name=slot_name(dataset),
            data_settings=settings_of(dataset),
            available=split.available,
            attacks=self.attacks,
            surrogates=surrogates,
            eot=self.evaluation.eot if self.attacks else (),
            precisions=self.scored,
            transfer=self.evaluation.transfer,
            seed=self.budget.seed,
            batch_size=self.budget.batch_size,
        )


@dataclass(frozen=True)
class AuditStep(StudyStep):
    """The audit of one network, beside its report.

    Args:
        row: what the report calls the network.
        model: its folder.
        precisions: what is audited.
        section: how.
        twin: name and folder of the network without the defense.
        ablations: names and folders of networks that lack a part of it.
        budget: images and seed.
    """

    row: str
    model: Path
    precisions: tuple[Precision, ...]
    section: StudyAudit
    twin: tuple[str, Path] | None
    ablations: tuple[tuple[str, Path], ...]
    budget: Budget

    def work(self, resources: StudyResources, progress: Progress) -> None:
        """Runs the checks that are missing, and writes audit.json."""
        found = audit(
            resources.loaded(self.model, self.row),
            resources.test_images(self.model, self.budget),
            precisions=self.precisions,
            twin=self.twin and resources.loaded(self.twin[1], self.twin[0]),
            ablations=[resources.loaded(folder, name) for name, folder in self.ablations],
            images=self.section.images,
            seed=self.budget.seed,
            batch_size=self.budget.batch_size,
            device=resources.where,
            profile=self.section.profile,
            folder=self.folder,
            progress=progress,
        )
        write_audits([found], self.folder)


@dataclass(frozen=True)
class AnalysisStep(StudyStep):
    """One analysis of some networks.

    Args:
        analysis: the analysis.
        models: names and folders of the networks.
        budget: images and seed.
    """

    analysis: Any
    models: tuple[tuple[str, Path], ...]
    budget: Budget

    def work(self, resources: StudyResources, progress: Progress) -> None:
        """Measures, or goes on with it."""
        _, first = self.models[0]
        dataset = resources.dataset(first)

        def load_train() -> Any:
            limit = self.budget.patch_images + self.budget.held_out
            return resources.images(first, "train", limit=limit, seed=self.budget.seed)

        data = AnalysisData(
            slot_name(dataset), resources.test_images(first, self.budget), settings_of(dataset), load_train
        )
        run_analysis(
            self.analysis,
            [resources.loaded(folder, name) for name, folder in self.models],
            data,
            self.folder,
            seed=self.budget.seed,
            progress=progress,
            device=resources.where,
            batch_size=self.budget.batch_size,
            command=resources.command,
        )
