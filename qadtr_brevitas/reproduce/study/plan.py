"""The plan of a study: its steps, each after the steps it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, cast

from qadtr_brevitas.attacks.base import Attack, IterativeAttack, TargetedAttack
from qadtr_brevitas.attacks.patch_settings import PatchSettings
from qadtr_brevitas.config.slots import slot_name
from qadtr_brevitas.core.errors import QadtrError, UsageError
from qadtr_brevitas.core.files import fingerprint_facts
from qadtr_brevitas.core.plugin import plugin_settings
from qadtr_brevitas.evaluation import NamedAttack
from qadtr_brevitas.evaluation.unseen import SEEN_SIZE, SIDE, UnseenPatch, left_out_bits, unseen_patches
from qadtr_brevitas.quant.inference import InferenceMode
from qadtr_brevitas.reproduce.analyses.base import Analysis
from qadtr_brevitas.reproduce.analyses.patches import finished_patches
from qadtr_brevitas.reproduce.study.attack_steps import (
    AnalysisStep,
    AuditStep,
    EvaluationStep,
    NamedFolder,
    PatchStep,
)
from qadtr_brevitas.reproduce.study.model_steps import AddPrecisionStep, ExistingModelStep, ModelStep
from qadtr_brevitas.reproduce.study.networks import StudyNetwork, StudyNetworks, make_networks
from qadtr_brevitas.reproduce.study.sections import Study, StudyAttack, StudyAudit, StudyEvaluation
from qadtr_brevitas.reproduce.study.steps import StudyStep

_KEY_LENGTH = 12
_ADDED_PRECISION_IMAGES = 512

_Step = TypeVar("_Step", bound=StudyStep)


@dataclass(frozen=True)
class NetworkEvaluation:
    """One network under one evaluation.

    Args:
        network: the network.
        evaluation: name of the evaluation.
        step: the step that makes its report.
    """

    network: StudyNetwork
    evaluation: str
    step: EvaluationStep


@dataclass(frozen=True)
class StudyPlan:
    """Everything a study has to make.

    Args:
        steps: all steps, each after those it needs.
        evaluations: the networks under their evaluations, in the order of the study.
        analyses: the steps that are analyses.
    """

    steps: Sequence[StudyStep]
    evaluations: Sequence[NetworkEvaluation]
    analyses: Sequence[AnalysisStep]


def make_plan(study: Study, *, work: Path, output: Path) -> StudyPlan:
    """Return the steps of a study. Nothing is made, and only recipes and finished models are read.

    Args:
        study: the study.
        work: folder that studies share.
        output: folder of this study.

    Raises:
        UsageError, RecipeError: a recipe does not exist or is wrong, a network has none of the precisions to score, or
            two reports would have the same folder.
        CheckpointError: a finished model does not exist.
    """
    attacks = {name: _with_budget(study, attack) for name, attack in study.attacks.items()}
    study = study.model_copy(update={"attacks": attacks})
    builder = _PlanBuilder(study, work, output, make_networks(study))
    evaluations, analyses = list(builder.evaluations()), list(builder.analyses())
    return StudyPlan(tuple(builder.steps.values()), evaluations, analyses)


@dataclass(frozen=True)
class _PlanBuilder:
    """Collects the steps of a study by their keys, so that what several reports need is made once."""

    study: Study
    work: Path
    output: Path
    networks: StudyNetworks
    steps: dict[str, StudyStep] = field(default_factory=dict[str, StudyStep])

    def evaluations(self) -> Iterator[NetworkEvaluation]:
        """Add the steps of every evaluation, and yield the evaluated networks."""
        by_folder: dict[Path, EvaluationStep] = {}
        for name, evaluation in self.study.evaluations.items():
            for network in self.networks.of_models(evaluation.models):
                step = self._evaluation(network, name, evaluation)
                other = by_folder.setdefault(step.folder, step)
                if other.report_name != step.report_name:
                    raise UsageError(
                        f"{other.report_name!r} and {step.report_name!r}, a network and an evaluation each, would both "
                        f"have their report in {step.folder}: rename a model or an evaluation of the study"
                    )
                yield NetworkEvaluation(network, name, step)
                if evaluation.audit is not None:
                    self._audit(network, step, evaluation.audit)

    def analyses(self) -> Iterator[AnalysisStep]:
        """Add and yield the step of every analysis."""
        for name, section in self.study.analyses.items():
            networks, analysis = self.networks.of_models(section.models), section.analysis
            settings = [
                slot_name(analysis),
                plugin_settings(analysis),
                _finished_patches(analysis),
                [network.name for network in networks],
                self._budget,
            ]
            yield self._add(
                AnalysisStep(
                    f"analysis {name}",
                    self.output / "analyses" / name,
                    settings,
                    tuple(map(self._model, networks)),
                    analysis,
                    tuple(map(self._named_folder, networks)),
                    self.study.budget,
                )
            )

    @property
    def _budget(self) -> dict[str, object]:
        return self.study.budget.model_dump(mode="json")

    def _add(self, step: _Step) -> _Step:
        """Add a step, or return the one of the same key that is there."""
        return cast(_Step, self.steps.setdefault(step.key, step))

    def _named_folder(self, network: StudyNetwork) -> NamedFolder:
        """Return the name and folder of a network; models that are made alike share a folder."""
        return network.name, self._model(network).folder

    def _model(self, network: StudyNetwork) -> StudyStep:
        folder = network.folder(self.work)
        if network.recipe is None:
            return self._add(ExistingModelStep(f"model {network.name}", folder, network.key, ()))
        needs = (self._model(network.start),) if network.start else ()
        verb = "train" if network.section.train else "convert"
        return self._add(ModelStep(f"{verb} {network.name}", folder, network.key, needs, network))

    def _model_with_added_precision(self, network: StudyNetwork) -> AddPrecisionStep:
        """Return the step for a network at a precision that was left out of its training."""
        precision = left_out_bits(network.precisions)
        budget, model = self.study.budget, self._model(network)
        images = min(budget.patch_images, _ADDED_PRECISION_IMAGES)
        settings = [str(precision), images, budget.seed]
        name = f"at-{precision}-{model.key[:_KEY_LENGTH]}-{fingerprint_facts(settings)[:_KEY_LENGTH]}"
        return self._add(
            AddPrecisionStep(
                f"calibrate {network.name} at {precision} bit",
                self.work / "models" / name,
                settings,
                (model,),
                model.folder,
                precision,
                images,
                budget.seed,
            )
        )

    def _evaluation(self, network: StudyNetwork, name: str, evaluation: StudyEvaluation) -> EvaluationStep:
        scored = self._scored(network, name, evaluation)
        model = self._model(network)
        specs = {attack: self.study.attacks[attack] for attack in evaluation.attacks}
        patches = self._all_patches(network, specs, evaluation)
        image_specs = [spec for spec in specs.values() if spec.is_per_image]
        sources = [source for spec in image_specs for source in self.networks.attack_sources(network, spec)]
        surrogates = {source.name: source for source in sources if source != network}
        attacks = tuple(attack for spec in image_specs for attack in _image_attacks(spec))
        report_name = network.name if len(self.study.evaluations) == 1 else f"{network.name} {name}"
        # Evaluations without certificates keep the reports that studies made before there were any.
        excluded = {"audit"} if evaluation.certify else {"audit", "certify"}
        settings = [
            [report_name, list(map(str, scored)), evaluation.model_dump(mode="json", exclude=excluded), self._budget],
            [[(step.label, step.source) for step in patches], list(surrogates)],
            [attack.fingerprint for attack in attacks],
        ]
        return self._add(
            EvaluationStep(
                f"evaluate {report_name}",
                self.output / "reports" / report_name.replace(" ", "-"),
                settings,
                (model, *patches, *map(self._model, surrogates.values())),
                report_name,
                model.folder,
                scored,
                evaluation,
                tuple(patches),
                attacks,
                tuple(map(self._named_folder, surrogates.values())),
                self.study.budget,
            )
        )

    def _scored(self, network: StudyNetwork, name: str, evaluation: StudyEvaluation) -> tuple[InferenceMode, ...]:
        """Return the modes that an evaluation scores a network in.

        Raises:
            UsageError: there is none, or one of them has nothing to certify.
        """
        scored = network.scored_modes(self.study)
        if not scored:
            known = ", ".join(map(str, network.precisions))
            raise UsageError(
                f"model {network.model} of the study has none of the precisions to score: it has {known}, give "
                f"models.{network.model}.precisions"
            )
        random = [mode for mode in scored if mode.is_random]
        if evaluation.certify and random:
            raise UsageError(
                f"{network.name} at {random[0]} answers differently each time, so that nothing can be proved: leave "
                f"out evaluations.{name}.certify, or {random[0]} where precisions are given"
            )
        return scored

    def _all_patches(
        self, network: StudyNetwork, specs: Mapping[str, StudyAttack], evaluation: StudyEvaluation
    ) -> list[PatchStep]:
        """Return the steps that make the patches of an evaluation."""
        # A protocol makes its own patches instead of those of the first attack.
        replaced = evaluation.attacks[0] if evaluation.protocol else None
        kept = [(label, spec) for label, spec in specs.items() if label != replaced]
        made = [step for label, spec in kept for step in self._patches(network, label, spec)]
        return [*made, *(self._unseen_patches(network, specs[replaced]) if replaced else [])]

    def _audit(self, network: StudyNetwork, evaluation: EvaluationStep, section: StudyAudit) -> None:
        """Add the audit of an evaluated network, at the single precisions it is scored at."""
        single = [mode.precisions[0] for mode in evaluation.scored if mode.is_single]
        precisions = tuple(p for p in single if p in (section.precisions or single))
        if not precisions:
            return
        twin = self.networks.counterparts(network, [section.twin] if section.twin else [])
        ablations = self.networks.counterparts(network, section.ablations)
        name = evaluation.report_name
        self._add(
            AuditStep(
                f"audit {name}",
                evaluation.folder,
                [name, list(map(str, precisions)), section.model_dump(mode="json"), self._budget],
                (evaluation, *map(self._model, (*twin, *ablations))),
                name,
                evaluation.model,
                precisions,
                section,
                self._named_folder(twin[0]) if twin else None,
                tuple(map(self._named_folder, ablations)),
                self.study.budget,
            )
        )

    def _patches(self, network: StudyNetwork, label: str, spec: StudyAttack) -> Iterator[PatchStep]:
        if spec.is_per_image:
            return
        for source in self.networks.attack_sources(network, spec):
            model = self._model(source)
            for mode in _crafting_modes(spec, source, self.study):
                yield self._patch(label, source.name, model, spec.attack, mode, spec.target_classes)

    def _unseen_patches(self, network: StudyNetwork, spec: StudyAttack) -> Iterator[PatchStep]:
        """Yield the steps of the protocol, on the networks and precisions of the attack it replaces."""
        size = spec.attack.size if isinstance(spec.attack, PatchSettings) else None
        image_side = size * SIDE // SEEN_SIZE if isinstance(size, int) else SIDE
        for unseen in unseen_patches(spec.attack, image_side):
            for source in self.networks.attack_sources(network, spec):
                if unseen.left_out_bits:
                    model = self._model_with_added_precision(source)
                    yield self._unseen_patch(unseen, source.name, model, InferenceMode((model.precision,)), spec)
                    continue
                for mode in _crafting_modes(spec, source, self.study):
                    yield self._unseen_patch(unseen, source.name, self._model(source), mode, spec)

    def _unseen_patch(
        self, unseen: UnseenPatch, source: str, model: StudyStep, mode: InferenceMode, spec: StudyAttack
    ) -> PatchStep:
        label = f"unseen {unseen.name}"
        return self._patch(
            label, source, model, unseen.attack, mode, spec.target_classes, other_targets=unseen.other_targets
        )

    def _patch(
        self,
        label: str,
        source: str,
        model: StudyStep,
        attack: Attack,
        mode: InferenceMode,
        targets: tuple[int | None, ...],
        *,
        other_targets: bool = False,
    ) -> PatchStep:
        budget, name = self.study.budget, slot_name(attack)
        images = [budget.patch_images, budget.held_out, budget.seed]
        settings = [name, plugin_settings(attack), str(mode), targets, other_targets, images]
        folder = f"{model.key[:_KEY_LENGTH]}-{name}-{fingerprint_facts(settings)[:_KEY_LENGTH]}"
        step = PatchStep(
            f"make patches: {label} on {source} at {mode}",
            self.work / "patches" / folder,
            settings,
            (model,),
            label,
            source,
            model.folder,
            attack,
            mode,
            targets,
            other_targets,
            budget,
        )
        # Attacks and models that are alike share the patches, and each has its own names for them.
        return replace(self._add(step), label=label, source=source)


def _with_budget(study: Study, spec: StudyAttack) -> StudyAttack:
    """Return an attack with the number of steps that the budget allows."""
    if study.budget.steps is None or not isinstance(spec.attack, IterativeAttack):
        return spec
    return spec.model_copy(update={"attack": spec.attack.with_settings(steps=study.budget.steps)})


def _finished_patches(analysis: Analysis) -> list[str]:
    """Return the fingerprints of the patches that an analysis reads, or none if they do not exist yet."""
    try:
        return finished_patches(analysis) if analysis.patches else []
    except QadtrError:
        # The analysis reports it if they are still missing when it runs.
        return []


def _crafting_modes(spec: StudyAttack, source: StudyNetwork, study: Study) -> list[InferenceMode]:
    """Return the precisions to make patches at on a network; its highest if it has none of the requested ones."""
    # Votes and random draws have no useful gradient, but the mean over their precisions has.
    wanted = spec.made_at or [
        mode if mode.is_single else InferenceMode(mode.precisions) for mode in source.scored_modes(study)
    ]
    found = [mode for mode in wanted if set(mode.precisions) <= set(source.precisions)]
    return list(dict.fromkeys(found)) or [InferenceMode((max(source.precisions),))]


def _image_attacks(spec: StudyAttack) -> Iterator[NamedAttack]:
    """Yield an attack on each image, for each of its target classes if it is targeted."""
    if not isinstance(spec.attack, TargetedAttack):
        yield NamedAttack.of(spec.attack)
        return
    for target in spec.target_classes:
        yield NamedAttack.of(spec.attack.with_settings(target=target))
