"""Every number of evaluations and analyses, described by the facets that the paper's tables use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

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
from qadtr_brevitas.reproduce.analyses.document import Record
from qadtr_brevitas.reproduce.analyses.pixel import MADE_AT_ATTACKED
from qadtr_brevitas.reproduce.page.inputs import AnalysisInput, StudyInput
from qadtr_brevitas.reproduce.page.study_file import StudyRow
from qadtr_brevitas.reproduce.paper import SUBJECT

WHITE_BOX, AT_FLOAT = "white-box", f"made at {FLOAT_BITS} bit"
SEEN, UNSEEN = "seen", "unseen"
_FLOAT = str(FLOAT_BITS)
# The names that `study` and `attack --protocol` give to the patches of the protocol.
_UNSEEN_NAME, _LEFT_OUT_NAME = re.compile(r"(^|/)unseen[ -]"), re.compile(r"(^|/)unseen[ -]left-out-bits\b")


@dataclass(frozen=True)
class Measurement:
    """One measured number.

    Args:
        what: the quantity: `asr`, `accuracy`, `clean accuracy`, or what an analysis calls it.
        origins: where its attack was made: `WHITE_BOX` on the precision attacked, `AT_FLOAT`, both, or neither.
        facets: everything else that describes it, as text.
        value: the number, shares in [0, 1]; None if there was nothing to measure.
        share: the counts behind it; None if it is not a share.
        interval: its 95 % interval, if there is one.
        n: number of images behind it.
    """

    what: str
    origins: frozenset[str]
    facets: Mapping[str, str]
    value: float | None
    share: Proportion | None = None
    interval: tuple[float, float] | None = None
    n: int | None = None

    @classmethod
    def of_share(cls, what: str, origins: Iterable[str], facets: Mapping[str, str], share: Proportion) -> Measurement:
        """Return the measurement of a share of images."""
        return cls(what, frozenset(origins), facets, share.value, share, share.interval, share.n)


@dataclass(frozen=True)
class PaperNames:
    """The names that the paper gives to models.

    Args:
        rows: the rows of a study, by the name of the model in its report.
        names: names of models by fingerprint, for the models that attacks were made on.
    """

    rows: Mapping[str, StudyRow]
    names: Mapping[str, str]

    def facets(self, model: str) -> dict[str, str]:
        """Return the facets of every number of a model."""
        return {SUBJECT: self.subject(model), "model": model}

    def subject(self, model: str) -> str:
        """Return the paper's name of a model, or its own name if the paper has none."""
        return self.rows[model].subject if model in self.rows else model

    def source(self, source: SourceFacts) -> str:
        """Return the paper's name of the model that an attack was made on."""
        return self.subject(self.names.get(source.fingerprint, source.name))

    def is_unseen(self, model: str) -> bool:
        """Return whether the patches on a model are unlike those of its training."""
        return model in self.rows and self.rows[model].is_unseen


def study_measurements(study: StudyInput) -> list[Measurement]:
    """Return all numbers of a study."""
    models = [model for report in study.reports for model in report.report.models]
    names = PaperNames(study.facts.rows, {model.fingerprint: model.name for model in models})
    found = [measured for report in study.reports for measured in report_measurements(report.report, names)]
    return [*found, *(measured for analysis in study.analyses for measured in analysis_measurements(analysis, names))]


def report_measurements(report: EvaluationReport, names: PaperNames) -> Iterator[Measurement]:
    """Yield the numbers of an evaluation."""
    for cell in report.clean:
        facets = {**names.facets(cell.model), "precision": cell.precision}
        for what, more in (("clean accuracy", {}), ("accuracy", {"eps": "0"})):
            yield Measurement.of_share(what, [WHITE_BOX, AT_FLOAT], {**facets, **more}, cell.accuracy.share)
    attacks, protocol = report.attack_facts(), _protocol_patches(report)
    models = {model.name: model for model in report.models}
    for cell in report.cells:
        facts, model = attacks[cell.attack], models[cell.model]
        if cell.threat == "control":
            continue
        facets = {
            **names.facets(cell.model),
            "precision": cell.precision,
            "attack": facts.attack,
            **_source_facets(cell, facts, model, names),
            **(_patch_facets(facts, report) if isinstance(facts, PatchFacts) else _pixel_facets(facts)),
        }
        is_unseen = names.is_unseen(cell.model) and facts.name in protocol
        if isinstance(facts, PatchFacts):
            facets["patches"] = UNSEEN if is_unseen else SEEN
        is_left_out = is_unseen and _is_made_at_left_out_precision(facts, model)
        origins = [WHITE_BOX, AT_FLOAT] if is_left_out else _origins(cell, facts)
        yield Measurement.of_share("asr", origins, facets, cell.asr.share)
        yield Measurement.of_share("accuracy", origins, facets, cell.robust_accuracy.share)


def analysis_measurements(analysis: AnalysisInput, names: PaperNames) -> Iterator[Measurement]:
    """Yield the numbers of an analysis."""
    for record in analysis.report.records:
        facets = {name: f"{v:g}" if isinstance(v, float) else str(v) for name, v in record.facets.items()}
        facets |= {**names.facets(record.model), "precision": record.precision}
        if "attack" in facets:
            # The paper names attacks without the sizes and settings that analyses add.
            facets["attack"] = facets["attack"].partition(" ")[0]
        interval = (record.low, record.high) if record.low is not None and record.high is not None else None
        yield Measurement(record.what, _record_origins(record), facets, record.value, None, interval, record.n)


def _protocol_patches(report: EvaluationReport) -> Set[str]:
    """Return the names of the protocol's patches; all patches if no name is one of the protocol."""
    named = {patch.name for patch in report.patches if _UNSEEN_NAME.search(patch.name)}
    return named or {patch.name for patch in report.patches}


def _is_made_at_left_out_precision(facts: PatchFacts | ImageAttackFacts, model: ModelFacts) -> bool:
    """Return whether a patch of the protocol was made at a precision left out of training, which is never attacked."""
    if facts.source is None or not parse_mode(facts.source.precision).is_single:
        return False
    if _UNSEEN_NAME.search(facts.name):
        return _LEFT_OUT_NAME.search(facts.name) is not None
    return facts.source.precision not in (_FLOAT, *model.precisions)


def _origins(cell: AttackCell, facts: PatchFacts | ImageAttackFacts) -> list[str]:
    at_float = facts.source is not None and facts.source.precision == _FLOAT
    return [*([WHITE_BOX] if cell.threat == "white-box" else []), *([AT_FLOAT] if at_float else [])]


def _record_origins(record: Record) -> frozenset[str]:
    if record.facets.get("made") == MADE_AT_ATTACKED:
        return frozenset({WHITE_BOX})
    return frozenset({WHITE_BOX, AT_FLOAT} if record.precision == _FLOAT else {AT_FLOAT})


def _source_facets(
    cell: AttackCell, facts: PatchFacts | ImageAttackFacts, model: ModelFacts, names: PaperNames
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


def _patch_facets(facts: PatchFacts, report: EvaluationReport) -> dict[str, str]:
    variant, (height, width) = facts.variant, report.data.image_size
    moved = {"shift": f"{variant.shift}", "degrees": f"{variant.degrees:g}"} if variant else {}
    # Two digits: a side of whole pixels covers a little less than the requested share.
    area = facts.settings.get("area") or round(facts.pixels / (height * width), 2)
    return {"size": facts.size, "area": f"{area:g}", **moved}


def _pixel_facets(facts: ImageAttackFacts) -> dict[str, str]:
    eps = facts.settings.get("eps")
    return {} if eps is None else {"eps": f"{eps:g}"}
