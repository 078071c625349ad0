"""From a study to its parts, each after those it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from qadtr_brevitas.attacks.base import IterativeAttack, TargetedAttack
from qadtr_brevitas.attacks.patch_settings import PatchSettings
from qadtr_brevitas.config.slots import slot_name
from qadtr_brevitas.core.errors import QadtrError, UsageError
from qadtr_brevitas.core.files import fingerprint_facts
from qadtr_brevitas.evaluation import NamedAttack
from qadtr_brevitas.evaluation.unseen import SEEN_SIZE, SIDE, UnseenPatch, left_out_bits, unseen_patches
from qadtr_brevitas.quant.inference import InferenceMode
from qadtr_brevitas.reproduce.analyses.patches import finished_patches
from qadtr_brevitas.reproduce.study.attack_steps import AnalysisStep, AuditStep, EvaluationStep, PatchStep
from qadtr_brevitas.reproduce.study.file import OWN
from qadtr_brevitas.reproduce.study.model_steps import AddPrecisionStep, ExistingModelStep, ModelStep
from qadtr_brevitas.reproduce.study.networks import StudyNetwork, make_nets
from qadtr_brevitas.reproduce.study.resources import settings_of
from qadtr_brevitas.reproduce.study.sections import Study, StudyAttack, StudyAudit, StudyEvaluation
from qadtr_brevitas.reproduce.study.steps import StudyStep

REPORTS, ANALYSES = "reports", "analyses"
_SHORT, _WIDENED_ON = 12, 512

_Part = TypeVar("_Part", bound=StudyStep)


@dataclass(frozen=True)
class Row:
    """One network under one evaluation, as tables show it.

    Args:
        network: the network.
        evaluation: name of the evaluation.
        part: what makes its report.
    """

    network: StudyNetwork
    evaluation: str
    part: EvaluationStep


@dataclass(frozen=True)
class StudyPlan:
    """Everything a study has to make.

    Args:
        parts: each after those it needs.
        rows: networks under evaluations, in the order of the study.
        analyses: the parts that are analyses.
    """

    parts: Sequence[StudyStep]
    rows: Sequence[Row]
    analyses: Sequence[AnalysisStep]


def make_plan(study: Study, *, work: Path, output: Path) -> StudyPlan:
    """The parts of a study; nothing is made yet, and nothing is read but the recipes and finished models it names.

    Args:
        study: the study.
        work: folder of what studies share.
        output: folder of this study.

    Raises:
        UsageError, RecipeError: a recipe that is not there or is wrong, or a network without a precision to score.
        CheckpointError: a finished model that is not there.
    """
    study = study.model_copy(update={"attacks": {name: _hurried(study, spec) for name, spec in study.attacks.items()}})
    planner = _Planner(study, work, output, make_nets(study))
    rows = list(planner.rows())
    analyses = list(planner.analyses())
    return StudyPlan(tuple(planner.parts.values()), rows, analyses)


@dataclass(frozen=True)
class _Planner:
    study: Study
    work: Path
    output: Path
    networks: dict[str, StudyNetwork]
    parts: dict[str, StudyStep] = field(default_factory=dict)

    def rows(self) -> Iterator[Row]:
        reports: dict[Path, EvaluationStep] = {}
        for name, evaluation in self.study.evaluations.items():
            for network in self._nets_of(evaluation.models):
                report = self._report(network, name, evaluation)
                other = reports.setdefault(report.folder, report)
                if other.row != report.row:
                    raise UsageError(
                        f"{other.row!r} and {report.row!r}, a network and an evaluation each, would both have their "
                        f"report in {report.folder}: rename a model or an evaluation of the study"
                    )
                yield Row(network, name, report)
                if evaluation.audit is not None:
                    self._audit(network, report, evaluation.audit)

    def analyses(self) -> Iterator[AnalysisStep]:
        for name, section in self.study.analyses.items():
            networks, analysis = self._nets_of(section.models), section.analysis
            patches = _finished_patches(analysis)
            made_of = [
                slot_name(analysis),
                settings_of(analysis),
                patches,
                [network.name for network in networks],
                self._budget,
            ]
            yield self._add(
                AnalysisStep(
                    f"analysis {name}",
                    self.output / ANALYSES / name,
                    made_of,
                    tuple(map(self._model, networks)),
                    analysis,
                    tuple(map(self._place, networks)),
                    self.study.budget,
                )
            )

    @property
    def _budget(self) -> dict[str, Any]:
        return self.study.budget.model_dump(mode="json")

    def _add(self, part: _Part) -> _Part:
        return self.parts.setdefault(part.key, part)  # pyright: ignore[reportReturnType]

    def _nets_of(self, models: Sequence[str]) -> list[StudyNetwork]:
        """The networks of the models named, or of all that are scored."""
        wanted = models or [name for name, model in self.study.models.items() if model.scored]
        return [network for name in wanted for network in self.networks.values() if network.model == name]

    def _place(self, network: StudyNetwork) -> tuple[str, Path]:
        """What a network is called, and where it is: two models that are made alike are made once."""
        return network.name, self._model(network).folder

    def _model(self, network: StudyNetwork) -> StudyStep:
        folder = network.folder(self.work)
        if network.recipe is None:
            return self._add(ExistingModelStep(f"model {network.name}", folder, network.key, ()))
        needs = (self._model(network.start),) if network.start else ()
        verb = "train" if network.section.train else "convert"
        return self._add(ModelStep(f"{verb} {network.name}", folder, network.key, needs, network))

    def _wider(self, network: StudyNetwork) -> AddPrecisionStep:
        """The network at a bit-width that was left out of its training."""
        precision = left_out_bits(network.precisions)
        budget, model = self.study.budget, self._model(network)
        images = min(budget.patch_images, _WIDENED_ON)
        made_of = [str(precision), images, budget.seed]
        name = f"at-{precision}-{model.key[:_SHORT]}-{fingerprint_facts(made_of)[:_SHORT]}"
        return self._add(
            AddPrecisionStep(
                f"calibrate {network.name} at {precision} bit",
                self.work / "models" / name,
                made_of,
                (model,),
                model.folder,
                precision,
                images,
                budget.seed,
            )
        )

    def _report(self, network: StudyNetwork, name: str, evaluation: StudyEvaluation) -> EvaluationStep:
        scored = network.scored(self.study)
        if not scored:
            have = ", ".join(map(str, network.precisions))
            raise UsageError(f"model {network.model} of the study has none of the precisions to score: it has {have}")
        model = self._model(network)
        specs = {attack: self.study.attacks[attack] for attack in evaluation.attacks}
        # A protocol makes patches of its own of the first attack.
        start = evaluation.attacks[0] if evaluation.protocol else None
        patches = [
            part for label, spec in specs.items() if label != start for part in self._patches(network, label, spec)
        ]
        patches += self._unseen(network, specs[start]) if start else []
        image = {label: spec for label, spec in specs.items() if spec.is_per_image}
        others = {
            other.name: other for spec in image.values() for other in self._sources(network, spec) if other != network
        }
        row = network.name if len(self.study.evaluations) == 1 else f"{network.name} {name}"
        attacks = tuple(attack for spec in image.values() for attack in _image_attacks(spec))
        made_of = [row, list(map(str, scored)), evaluation.model_dump(mode="json", exclude={"audit"}), self._budget]
        names = [[(part.label, part.source) for part in patches], list(others)]
        return self._add(
            EvaluationStep(
                f"evaluate {row}",
                self.output / REPORTS / row.replace(" ", "-"),
                [made_of, names, [attack.fingerprint for attack in attacks]],
                (model, *patches, *map(self._model, others.values())),
                row,
                model.folder,
                scored,
                evaluation,
                tuple(patches),
                attacks,
                tuple(map(self._place, others.values())),
                self.study.budget,
            )
        )

    def _audit(self, network: StudyNetwork, report: EvaluationStep, section: StudyAudit) -> None:
        """The audit of a network that has a report, at the single precisions it is scored at."""
        single = [mode.precisions[0] for mode in report.scored if mode.is_single]
        precisions = tuple(p for p in single if p in (section.precisions or single))
        if not precisions:
            return
        twin = self._alike(network, [section.twin] if section.twin else [])
        ablations = self._alike(network, section.ablations)
        made_of = [report.row, list(map(str, precisions)), section.model_dump(mode="json"), self._budget]
        self._add(
            AuditStep(
                f"audit {report.row}",
                report.folder,
                made_of,
                (report, *map(self._model, (*twin, *ablations))),
                report.row,
                report.model,
                precisions,
                section,
                self._place(twin[0]) if twin else None,
                tuple(map(self._place, ablations)),
                self.study.budget,
            )
        )

    def _alike(self, network: StudyNetwork, models: Sequence[str]) -> list[StudyNetwork]:
        """Networks of other models to compare with: of the same seed and bit-width where there are such."""
        found: list[StudyNetwork] = []
        for name in models:
            networks = [other for other in self._nets_of([name]) if other is not network]
            same_bits = [other for other in networks if other.bits == network.bits] or networks
            same_seed = [other for other in same_bits if other.seed == network.seed] or same_bits
            found += same_seed[:1] if network.model != name else []
        return found

    def _sources(self, network: StudyNetwork, spec: StudyAttack) -> list[StudyNetwork]:
        """The networks an attack is made on: of several seeds the one that the victim has."""
        found: list[StudyNetwork] = []
        for name in spec.made_on or (OWN,):
            networks = [network] if name == OWN else self._nets_of([name])
            alike = [other for other in networks if other.seed == network.seed]
            found += alike or networks[:1]
        return list(dict.fromkeys(found))

    def _patches(self, network: StudyNetwork, label: str, spec: StudyAttack) -> Iterator[PatchStep]:
        if spec.is_per_image:
            return
        for source in self._sources(network, spec):
            part = self._model(source)
            for mode in _accesses(spec, source, self.study):
                yield self._patch(label, source.name, part, spec.attack, mode, spec.aims)

    def _unseen(self, network: StudyNetwork, spec: StudyAttack) -> Iterator[PatchStep]:
        """The protocol's patches, made where the seen ones would be."""
        size = spec.attack.size if isinstance(spec.attack, PatchSettings) else None
        side = size * SIDE // SEEN_SIZE if isinstance(size, int) else SIDE
        for unseen in unseen_patches(spec.attack, side):
            for source in self._sources(network, spec):
                if unseen.left_out_bits:
                    wider = self._wider(source)
                    yield self._unseen_patch(unseen, source.name, wider, InferenceMode((wider.precision,)), spec)
                    continue
                for mode in _accesses(spec, source, self.study):
                    yield self._unseen_patch(unseen, source.name, self._model(source), mode, spec)

    def _unseen_patch(
        self, unseen: UnseenPatch, source: str, model: StudyStep, mode: InferenceMode, spec: StudyAttack
    ) -> PatchStep:
        return self._patch(
            f"unseen {unseen.name}",
            source,
            model,
            unseen.attack,
            mode,
            spec.aims,
            elsewhere=unseen.other_targets,
        )

    def _patch(
        self,
        label: str,
        source: str,
        model: StudyStep,
        attack: Any,
        mode: InferenceMode,
        targets: tuple[int | None, ...],
        *,
        elsewhere: bool = False,
    ) -> PatchStep:
        budget, name = self.study.budget, slot_name(attack)
        images = [budget.patch_images, budget.held_out, budget.seed]
        made_of = [name, settings_of(attack), str(mode), targets, elsewhere, images]
        folder = f"{model.key[:_SHORT]}-{name}-{fingerprint_facts(made_of)[:_SHORT]}"
        part = PatchStep(
            f"make patches: {label} on {source} at {mode}",
            self.work / "patches" / folder,
            made_of,
            (model,),
            label,
            source,
            model.folder,
            attack,
            mode,
            targets,
            elsewhere,
            budget,
        )
        # Attacks and models that come to the same share the patches, and each has its own names for them.
        return replace(self._add(part), label=label, source=source)


def _hurried(study: Study, spec: StudyAttack) -> StudyAttack:
    """The attack with the number of steps that the budget allows."""
    if study.budget.steps is None or not isinstance(spec.attack, IterativeAttack):
        return spec
    return spec.model_copy(update={"attack": spec.attack.with_settings(steps=study.budget.steps)})


def _finished_patches(analysis: Any) -> list[str]:
    try:
        return finished_patches(analysis)
    except QadtrError:
        # Told when the analysis is made; until then they may come.
        return []


def _accesses(spec: StudyAttack, source: StudyNetwork, study: Study) -> list[InferenceMode]:
    """What an attack is made at on a network; its highest precision where it has none of those asked for."""
    # Neither votes nor random draws have a gradient worth following: their mean has.
    wanted = spec.made_at or [
        mode if mode.is_single else InferenceMode(mode.precisions) for mode in source.scored(study)
    ]
    found = [mode for mode in wanted if set(mode.precisions) <= set(source.precisions)]
    return list(dict.fromkeys(found)) or [InferenceMode((max(source.precisions),))]


def _image_attacks(spec: StudyAttack) -> Iterator[NamedAttack]:
    """An attack on each image, for every class it aims at where it aims at classes."""
    name = slot_name(spec.attack)
    if not isinstance(spec.attack, TargetedAttack):
        yield NamedAttack(name, spec.attack)
        return
    for target in spec.aims:
        yield NamedAttack(name, spec.attack.with_settings(target=target))
