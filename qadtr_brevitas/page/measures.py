"""Every figure of evaluations and analyses with what it is of, as the paper's figures are told apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qadtr_brevitas.metrics import Share
from qadtr_brevitas.page.parts import AnalysisPart, StudyPart
from qadtr_brevitas.paper import SUBJECT
from qadtr_brevitas.precision import FLOAT_BITS
from qadtr_brevitas.report import AttackCell, ImageAttackFacts, PatchFacts, Report

WHITE_BOX, AT_FLOAT = "white-box", f"made at {FLOAT_BITS} bit"
SEEN, UNSEEN = "seen", "unseen"
_FLOAT = str(FLOAT_BITS)


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
    share: Share | None = None
    interval: tuple[float, float] | None = None
    n: int | None = None


def study_measures(part: StudyPart) -> list[Measure]:
    """All figures of a study; the subject is what the paper calls a model."""
    found: list[Measure] = []
    for report in part.reports:
        patches = UNSEEN if part.is_unseen(report) else SEEN
        found += report_measures(report.report, _names(part), patches)
    for analysis in part.analyses:
        found += analysis_measures(analysis, _names(part))
    return found


def _names(part: StudyPart) -> dict[str, str]:
    return {model: row.paper or row.label for model, row in part.facts.rows.items()}


def report_measures(report: Report, names: Mapping[str, str], patches: str) -> Iterator[Measure]:
    """The figures of an evaluation.

    Args:
        report: the evaluation.
        names: what the paper calls its models.
        patches: `seen` or `unseen`.
    """
    for cell in report.clean:
        facets = {SUBJECT: names.get(cell.model, cell.model), "model": cell.model, "precision": cell.precision}
        for what, more in (("clean accuracy", {}), ("accuracy", {"eps": "0"})):
            yield _measure(what, [WHITE_BOX, AT_FLOAT], {**facets, **more}, cell.accuracy.share)
    by_name = report.attack_facts()
    own = {model.name: model.fingerprint for model in report.models}
    for cell in report.cells:
        facts = by_name[cell.attack]
        if cell.threat == "control":
            continue
        facets = {
            SUBJECT: names.get(cell.model, cell.model),
            "model": cell.model,
            "precision": cell.precision,
            "attack": facts.attack,
            **_source(cell, facts, names, own),
            **(_patch(facts, report, patches) if isinstance(facts, PatchFacts) else _pixel(facts)),
        }
        made = [WHITE_BOX] if cell.threat == "white-box" else []
        made += [AT_FLOAT] if facts.source and facts.source.precision == _FLOAT else []
        yield _measure("asr", made, facets, cell.asr.share)
        yield _measure("accuracy", made, facets, cell.robust_accuracy.share)


def _source(
    cell: AttackCell, facts: PatchFacts | ImageAttackFacts, names: Mapping[str, str], own: Mapping[str, str]
) -> dict[str, str]:
    source = facts.source
    if source is None:
        return {}
    at = source.precision
    same = source.fingerprint == own[cell.model]
    return {
        "source": names.get(source.name, source.name),
        "from": "itself" if same else "another model",
        "made_at": "same" if same and at == cell.precision else at,
    }


def _patch(facts: PatchFacts, report: Report, patches: str) -> dict[str, str]:
    variant, (height, width) = facts.variant, report.data.image_size
    moved = {"shift": f"{variant.shift}", "degrees": f"{variant.degrees:g}"} if variant else {}
    # To two figures: a side in whole pixels covers a little less than the share asked for.
    budget = facts.settings.get("np") or round(facts.pixels / (height * width), 2)
    return {"size": facts.size, "np": f"{budget:g}", "patches": patches, **moved}


def _pixel(facts: ImageAttackFacts) -> dict[str, str]:
    eps: Any = facts.settings.get("eps")
    return {} if eps is None else {"eps": f"{eps:g}"}


def _measure(what: str, made: list[str], facets: Mapping[str, str], share: Share) -> Measure:
    return Measure(what, frozenset(made), facets, share.value, share, share.interval, share.n)


def analysis_measures(part: AnalysisPart, names: Mapping[str, str]) -> Iterator[Measure]:
    """The figures of an analysis."""
    for record in part.report.records:
        facets = {
            name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in record.facets.items()
        }
        facets |= {SUBJECT: names.get(record.model, record.model), "model": record.model, "precision": record.precision}
        made = [WHITE_BOX, AT_FLOAT] if record.precision == _FLOAT else [AT_FLOAT]
        if facets.get("made") == "on the precision attacked":
            made = [WHITE_BOX]
        interval = (record.low, record.high) if record.low is not None and record.high is not None else None
        yield Measure(record.what, frozenset(made), facets, record.value, None, interval, record.n)
