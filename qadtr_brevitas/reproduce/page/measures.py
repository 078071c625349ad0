"""Every figure of evaluations and analyses with what it is of, as the paper's figures are told apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from qadtr_brevitas.core.precision import FLOAT_BITS
from qadtr_brevitas.evaluation.metrics import Proportion
from qadtr_brevitas.evaluation.report import (
    AttackCell,
    EvaluationReport,
    ImageAttackFacts,
    ModelFacts,
    PatchFacts,
    SourceFacts,
)
from qadtr_brevitas.quant.inference import parse_mode
from qadtr_brevitas.reproduce.page.parts import AnalysisInput, StudyInput, StudyRow
from qadtr_brevitas.reproduce.paper import SUBJECT

WHITE_BOX, AT_FLOAT = "white-box", f"made at {FLOAT_BITS} bit"
SEEN, UNSEEN = "seen", "unseen"
_FLOAT = str(FLOAT_BITS)
# As `study` and `attack --protocol` name them.
_PROTOCOL, _LEFT_OUT = re.compile(r"(^|/)unseen[ -]"), re.compile(r"(^|/)unseen[ -]left-out-bits\b")


@dataclass(frozen=True)
class Measure:
    """One figure.

    Args:
        what: `asr`, `accuracy`, `clean accuracy`, or what an analysis calls it.
        made: how its attack was made: on the precision attacked, at 32 bit, both, or neither.
        facets: what else it is of, as text.
        share: the counts behind it; None for figures that are no share.
        value: the figure itself, shares in [0, 1]; None where there was nothing to measure.
        interval: its 95 % interval, where there is one.
        n: how many images it is of.
    """

    what: str
    made: frozenset[str]
    facets: Mapping[str, str]
    value: float | None
    share: Proportion | None = None
    interval: tuple[float, float] | None = None
    n: int | None = None


@dataclass(frozen=True)
class ModelNames:
    """What models stand for.

    Args:
        rows: by the name of the model in its report.
        prints: name of the model by its fingerprint, for the models that attacks were made on.
    """

    rows: Mapping[str, StudyRow]
    prints: Mapping[str, str]

    def facets(self, model: str) -> dict[str, str]:
        """What is said of every figure of a model."""
        return {SUBJECT: self.subject(model), "model": model}

    def subject(self, model: str) -> str:
        """What the paper calls a model; its name where it has none there."""
        return self.rows[model].subject if model in self.rows else model

    def source(self, source: SourceFacts) -> str:
        """What the paper calls the model that an attack was made on."""
        return self.subject(self.prints.get(source.fingerprint, source.name))

    def is_unseen(self, model: str) -> bool:
        """Whether the patches that a model meets are unlike those of training."""
        return model in self.rows and self.rows[model].is_unseen


def study_measures(part: StudyInput) -> list[Measure]:
    """All figures of a study."""
    prints = {model.fingerprint: model.name for report in part.reports for model in report.report.models}
    names = ModelNames(part.facts.rows, prints)
    found = [measure for report in part.reports for measure in report_measures(report.report, names)]
    return [*found, *(measure for analysis in part.analyses for measure in analysis_measures(analysis, names))]


def report_measures(report: EvaluationReport, names: ModelNames) -> Iterator[Measure]:
    """The figures of an evaluation."""
    for cell in report.clean:
        facets = {**names.facets(cell.model), "precision": cell.precision}
        for what, more in (("clean accuracy", {}), ("accuracy", {"eps": "0"})):
            yield _measure(what, [WHITE_BOX, AT_FLOAT], {**facets, **more}, cell.accuracy.share)
    by_name, protocol = report.attack_facts(), _protocol(report)
    models = {model.name: model for model in report.models}
    for cell in report.cells:
        facts, model = by_name[cell.attack], models[cell.model]
        if cell.threat == "control":
            continue
        facets = {
            **names.facets(cell.model),
            "precision": cell.precision,
            "attack": facts.attack,
            **_source(cell, facts, model, names),
            **(_patch(facts, report) if isinstance(facts, PatchFacts) else _pixel(facts)),
        }
        is_unseen = names.is_unseen(cell.model) and facts.name in protocol
        if isinstance(facts, PatchFacts):
            facets["patches"] = UNSEEN if is_unseen else SEEN
        made = [WHITE_BOX, AT_FLOAT] if is_unseen and _is_left_out(facts, model) else _made(cell, facts)
        yield _measure("asr", made, facets, cell.asr.share)
        yield _measure("accuracy", made, facets, cell.robust_accuracy.share)


def _protocol(report: EvaluationReport) -> Set[str]:
    """Names of the patches of the protocol, beside which others may stand; all where none is named after it."""
    named = {patch.name for patch in report.patches if _PROTOCOL.search(patch.name)}
    return named or {patch.name for patch in report.patches}


def _is_left_out(facts: PatchFacts | ImageAttackFacts, model: ModelFacts) -> bool:
    """Whether a patch of the protocol was made at a bit-width left out of training, which is never one attacked."""
    if facts.source is None or not parse_mode(facts.source.precision).is_single:
        return False
    if _PROTOCOL.search(facts.name):
        return _LEFT_OUT.search(facts.name) is not None
    return facts.source.precision not in (_FLOAT, *model.precisions)


def _made(cell: AttackCell, facts: PatchFacts | ImageAttackFacts) -> list[str]:
    at_float = facts.source is not None and facts.source.precision == _FLOAT
    return [*([WHITE_BOX] if cell.threat == "white-box" else []), *([AT_FLOAT] if at_float else [])]


def _source(
    cell: AttackCell, facts: PatchFacts | ImageAttackFacts, model: ModelFacts, names: ModelNames
) -> dict[str, str]:
    source = facts.source
    if source is None:
        return {}
    same, at = source.fingerprint == model.fingerprint, source.precision
    return {
        "source": names.source(source),
        "from": "itself" if same else "another model",
        "made_at": "same" if same and at == cell.precision else at,
    }


def _patch(facts: PatchFacts, report: EvaluationReport) -> dict[str, str]:
    variant, (height, width) = facts.variant, report.data.image_size
    moved = {"shift": f"{variant.shift}", "degrees": f"{variant.degrees:g}"} if variant else {}
    # To two figures: a side in whole pixels covers a little less than the share asked for.
    budget = facts.settings.get("area") or round(facts.pixels / (height * width), 2)
    return {"size": facts.size, "np": f"{budget:g}", **moved}


def _pixel(facts: ImageAttackFacts) -> dict[str, str]:
    eps: Any = facts.settings.get("eps")
    return {} if eps is None else {"eps": f"{eps:g}"}


def _measure(what: str, made: list[str], facets: Mapping[str, str], share: Proportion) -> Measure:
    return Measure(what, frozenset(made), facets, share.value, share, share.interval, share.n)


def analysis_measures(part: AnalysisInput, names: ModelNames) -> Iterator[Measure]:
    """The figures of an analysis."""
    for record in part.report.records:
        facets = {
            name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in record.facets.items()
        }
        facets |= {**names.facets(record.model), "precision": record.precision}
        if "attack" in facets:
            # The paper names attacks only, analyses their sizes and settings too.
            facets["attack"] = facets["attack"].partition(" ")[0]
        made = [WHITE_BOX, AT_FLOAT] if record.precision == _FLOAT else [AT_FLOAT]
        if facets.get("made") == "on the precision attacked":
            made = [WHITE_BOX]
        interval = (record.low, record.high) if record.low is not None and record.high is not None else None
        yield Measure(record.what, frozenset(made), facets, record.value, None, interval, record.n)
