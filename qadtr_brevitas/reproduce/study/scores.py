"""The scores of a study: accuracies, attack success and certificates of every network, read from its reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from qadtr_brevitas.evaluation.metrics import Proportion
from qadtr_brevitas.evaluation.report import AttackCell, EvaluationReport, Rate, read_report
from qadtr_brevitas.reproduce.study.plan import NetworkEvaluation, StudyPlan

CLEAN, DEFENDED, CERTIFIED = "clean accuracy", "defended", "certified"
UNSEEN_PREFIX, UNSEEN_MEAN = "unseen ", "unseen, mean of all kinds"


@dataclass(frozen=True, kw_only=True)
class StudyScore:
    """One number of a study.

    Args:
        model: name of the model in the study.
        evaluation: name of the evaluation.
        seed: training seed; None for a finished model.
        precision: the precision that was scored.
        kind: name of the attack in the study, `defended` or `certified`; empty for clean accuracy and means.
        what: `clean accuracy`, the attack and where it was made, or the patch and masks of a certificate.
        threat: what the attack knew: `white-box`, `eot`, `transfer`, or `control` for patches of noise.
        made_on: the network that the attack was made on.
        made_at: the precision that it was made at, or several together.
        targets: number of targets that the value is a mean over.
        value: share in [0, 1].
        share: the counts behind the value; None if it is a mean over targets or attacks.
    """

    model: str
    evaluation: str
    seed: int | None
    precision: str = ""
    kind: str = ""
    what: str = ""
    threat: str = ""
    made_on: str = ""
    made_at: str = ""
    targets: int = 1
    value: float = 0.0
    share: Proportion | None = None


def study_scores(plan: StudyPlan) -> list[StudyScore]:
    """Return the scores of all networks of a study whose reports are finished.

    Raises:
        CheckpointError: a report cannot be read.
    """
    return [score for evaluated in plan.evaluations for score in _scores(evaluated)]


@dataclass(frozen=True)
class _AttackSource:
    """Where an attack comes from.

    Args:
        kind: name of the attack in the study.
        network: the network it was made on.
        mode: the precision it was made at, or several together.
        is_own: whether it was made on the attacked network.
        is_patch: whether it is a universal patch.
        is_black_box: whether it uses no gradients.
    """

    kind: str
    network: str = ""
    mode: str = ""
    is_own: bool = True
    is_patch: bool = True
    is_black_box: bool = False

    def label(self, threat: str) -> str:
        """Return the label of its row in tables."""
        if threat == "control":
            return self.kind
        if threat == "white-box":
            return f"{self.kind}, {'black-box' if self.is_black_box else threat}"
        return f"{self.kind}{'' if self.is_own else f' on {self.network}'}, made at {self.mode}"


_CONTROL = _AttackSource("random patch")


def _scores(evaluated: NetworkEvaluation) -> Iterator[StudyScore]:
    report = read_report(evaluated.step.folder)
    network = evaluated.network
    base = StudyScore(model=network.model, evaluation=evaluated.evaluation, seed=network.seed)
    for cell in report.clean:
        rate = cell.accuracy
        yield replace(base, precision=cell.precision, what=CLEAN, value=rate.value or 0, share=rate.share)
    sources = _attack_sources(evaluated, report)
    for precision in report.models[0].precisions:
        found = list(_attack_scores(report, sources, replace(base, precision=precision)))
        yield from found
        if unseen := _one_of_each_kind([score for score in found if score.kind.startswith(UNSEEN_PREFIX)]):
            mean = fmean(score.value for score in unseen)
            yield replace(base, precision=precision, what=UNSEEN_MEAN, targets=len(unseen), value=mean)
    for cell in report.certified:
        for kind, rate in ((DEFENDED, cell.clean_accuracy), (CERTIFIED, cell.certified_accuracy)):
            what = f"{cell.label}: {kind}"
            yield replace(base, precision=cell.precision, kind=kind, what=what, value=rate.value or 0, share=rate.share)


def _attack_scores(
    report: EvaluationReport, sources: Mapping[str, _AttackSource], base: StudyScore
) -> Iterator[StudyScore]:
    """Yield the mean over targets of each attack, by where it was made."""
    groups: dict[tuple[_AttackSource, str], list[AttackCell]] = {}
    for cell in report.cells:
        if cell.precision == base.precision and cell.asr.value is not None:
            groups.setdefault((sources.get(cell.attack, _CONTROL), cell.threat), []).append(cell)
    for (source, threat), cells in groups.items():
        label = source.label(threat)
        score = replace(base, kind=source.kind, threat=threat, made_on=source.network, made_at=source.mode)
        yield _mean_score(replace(score, what=label), [cell.asr for cell in cells])
        if not source.is_patch:
            # Pixel attacks are usually reported by the accuracy they leave.
            yield _mean_score(replace(score, what=f"{label}: accuracy"), [cell.robust_accuracy for cell in cells])


def _mean_score(score: StudyScore, rates: Sequence[Rate]) -> StudyScore:
    value = fmean(rate.value or 0 for rate in rates)
    return replace(score, targets=len(rates), value=value, share=rates[0].share if len(rates) == 1 else None)


def _one_of_each_kind(scores: Sequence[StudyScore]) -> list[StudyScore]:
    """Return one score of each kind of attack, made at the precision that is scored if there is one."""
    white_box_last = sorted(scores, key=lambda score: score.threat == "white-box")
    return list({score.kind: score for score in white_box_last}.values())


def _attack_sources(evaluated: NetworkEvaluation, report: EvaluationReport) -> dict[str, _AttackSource]:
    """Return the sources of all attacks of a report, by the names that the report gives them."""
    found: dict[str, _AttackSource] = {}
    for step in evaluated.step.patches:
        is_own = step.source == evaluated.network.name
        source = _AttackSource(step.label, step.source, str(step.mode), is_own=is_own)
        found |= {patch.name: source for patch in step.named_patches()}
    for facts in report.attacks:
        is_own = facts.source.name == evaluated.step.report_name
        found[facts.name] = _AttackSource(
            facts.family,
            facts.source.name,
            facts.source.precision,
            is_own,
            is_patch=False,
            is_black_box=facts.black_box,
        )
    return found
