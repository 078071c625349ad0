"""The steps that make patches, and those that evaluate, audit and analyze networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from qadtr_brevitas.attacks.base import Attack, PatchAttack
from qadtr_brevitas.auditing import audit
from qadtr_brevitas.auditing.tables import write_audits
from qadtr_brevitas.config.slots import slot_name
from qadtr_brevitas.core.plugin import plugin_settings
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation import Grid, NamedAttack, compute, make_report
from qadtr_brevitas.evaluation.cells import CellStore
from qadtr_brevitas.evaluation.craft import CraftSetup, craft
from qadtr_brevitas.evaluation.entries import NamedPatch, load_patches
from qadtr_brevitas.evaluation.report.files import write_report
from qadtr_brevitas.evaluation.report.gallery import draw_pictures
from qadtr_brevitas.evaluation.unseen import other_targets
from qadtr_brevitas.pipeline.directories import CELL_FOLDER
from qadtr_brevitas.quant.inference import InferenceMode
from qadtr_brevitas.reproduce.analyses import Analysis, AnalysisData, run_analysis
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.sections import Budget, StudyAudit, StudyEvaluation
from qadtr_brevitas.reproduce.study.steps import StudyStep

NamedFolder: TypeAlias = tuple[str, Path]
"""The name of a network in reports, and its folder."""


@dataclass(frozen=True)
class PatchStep(StudyStep):
    """Make the patches of one attack on one network at one precision, one for each target class.

    Args:
        label: name of the attack in reports.
        source: name of the network.
        model: its folder.
        attack: the attack.
        mode: the precision, or several together.
        targets: target classes; None for an untargeted patch.
        other_targets: aim at as many other classes instead.
        budget: images and seed.
    """

    label: str
    source: str
    model: Path
    attack: Attack
    mode: InferenceMode
    targets: tuple[int | None, ...]
    other_targets: bool
    budget: Budget

    def execute(self, resources: StudyResources, progress: Progress) -> None:
        """Make the patches that are missing."""
        train, held_out = resources.patch_images(self.model, self.budget)
        dataset = resources.dataset(self.model)
        targets = other_targets(self.targets, len(train.classes)) if self.other_targets else self.targets
        setup = CraftSetup(
            train=train,
            held_out=held_out,
            output=self.folder,
            data={"name": slot_name(dataset), "settings": plugin_settings(dataset)},
            seed=self.budget.seed,
            batch_size=self.budget.batch_size,
            device=resources.device,
            progress=progress,
        )
        loaded = resources.load_model(self.model, self.source)
        assert isinstance(self.attack, PatchAttack), "studies are checked when they are read"
        craft(loaded, self.attack, setup, name=slot_name(self.attack), precisions=[self.mode], targets=targets)

    def named_patches(self) -> Iterator[NamedPatch]:
        """Yield the finished patches, under the names that the study gives them."""
        for found in load_patches([self.folder]):
            target = found.patch.meta.get("target")
            aim = "untargeted" if target is None else f"to {target}"
            patch = replace(found.patch, meta={**found.patch.meta, "model": self.source})
            yield replace(found, name=f"{self.label} on {self.source} at {self.mode} {aim}", patch=patch)


@dataclass(frozen=True)
class EvaluationStep(StudyStep):
    """Evaluate one network under the attacks of one evaluation, with a report of its own.

    Args:
        report_name: name of the network in the report.
        model: its folder.
        scored: the precisions it is scored at.
        evaluation: the evaluation.
        patches: the steps that make its patches.
        attacks: attacks on each image.
        surrogates: other networks that these attacks are made on as well.
        budget: images and seed.
    """

    report_name: str
    model: Path
    scored: tuple[InferenceMode, ...]
    evaluation: StudyEvaluation
    patches: tuple[PatchStep, ...]
    attacks: tuple[NamedAttack, ...]
    surrogates: tuple[NamedFolder, ...]
    budget: Budget

    def execute(self, resources: StudyResources, progress: Progress) -> None:
        """Compute the cells that no study has computed yet, and write the report."""
        patches = [patch for step in self.patches for patch in step.named_patches()]
        grid = self._grid(resources, patches)
        store = CellStore(resources.work / CELL_FOLDER)
        compute(grid.jobs(), store, device=resources.device, progress=progress)
        report = make_report(grid, store, device=str(resources.device), command=resources.command)
        pictures: Sequence[Path] = []
        if self.budget.pictures:
            self.folder.mkdir(parents=True, exist_ok=True)
            pictures = draw_pictures(
                report, grid.loaded_models, patches, grid.split, folder=self.folder, device=resources.device
            )
        write_report(report, self.folder, pictures=pictures)

    def _grid(self, resources: StudyResources, patches: Sequence[NamedPatch]) -> Grid:
        dataset = resources.dataset(self.model)
        split = resources.test_images(self.model, self.budget)
        certify = self.evaluation.certify
        return Grid(
            loaded_models=[resources.load_model(self.model, self.report_name)],
            patches=patches,
            split=split,
            data_name=slot_name(dataset),
            data_settings=plugin_settings(dataset),
            available=split.available,
            attacks=self.attacks,
            surrogates=[resources.load_model(folder, name) for name, folder in self.surrogates],
            eot=self.evaluation.eot if self.attacks else (),
            precisions=self.scored,
            transfer=self.evaluation.transfer,
            certifications=certify.certifications if certify else (),
            certify_images=certify and certify.count(len(split)),
            seed=self.budget.seed,
            batch_size=self.budget.batch_size,
        )


@dataclass(frozen=True)
class AuditStep(StudyStep):
    """Audit one network; the audit is written beside its report.

    Args:
        report_name: name of the network in the report.
        model: its folder.
        precisions: the precisions to audit.
        section: images and profile of the audit.
        twin: the network without the defense, if there is one.
        ablations: networks that lack a part of the defense.
        budget: images and seed.
    """

    report_name: str
    model: Path
    precisions: tuple[Precision, ...]
    section: StudyAudit
    twin: NamedFolder | None
    ablations: tuple[NamedFolder, ...]
    budget: Budget

    def execute(self, resources: StudyResources, progress: Progress) -> None:
        """Run the checks that are missing, and write audit.json."""
        found = audit(
            resources.load_model(self.model, self.report_name),
            resources.test_images(self.model, self.budget),
            precisions=self.precisions,
            twin=self.twin and resources.load_model(self.twin[1], self.twin[0]),
            ablations=[resources.load_model(folder, name) for name, folder in self.ablations],
            images=self.section.images,
            seed=self.budget.seed,
            batch_size=self.budget.batch_size,
            device=resources.device,
            profile=self.section.profile,
            folder=self.folder,
            progress=progress,
        )
        write_audits([found], self.folder)


@dataclass(frozen=True)
class AnalysisStep(StudyStep):
    """Run one analysis of some networks.

    Args:
        analysis: the analysis.
        models: the networks.
        budget: images and seed.
    """

    analysis: Analysis
    models: tuple[NamedFolder, ...]
    budget: Budget

    def execute(self, resources: StudyResources, progress: Progress) -> None:
        """Run the analysis on the data set of the first network."""
        _, first = self.models[0]
        dataset = resources.dataset(first)

        def load_train() -> Split:
            limit = self.budget.patch_images + self.budget.held_out
            return resources.images(first, "train", limit=limit, seed=self.budget.seed)

        test = resources.test_images(first, self.budget)
        run_analysis(
            self.analysis,
            [resources.load_model(folder, name) for name, folder in self.models],
            AnalysisData(slot_name(dataset), test, plugin_settings(dataset), load_train),
            self.folder,
            seed=self.budget.seed,
            progress=progress,
            device=resources.device,
            batch_size=self.budget.batch_size,
            command=resources.command,
        )
