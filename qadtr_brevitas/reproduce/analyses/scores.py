"""Evaluations of patches and attacks within an analysis, and their rates as records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from qadtr_brevitas.evaluation import Grid, NamedAttack, evaluate
from qadtr_brevitas.evaluation.entries import LoadedModel, NamedPatch
from qadtr_brevitas.evaluation.grid import Transfer
from qadtr_brevitas.evaluation.metrics import mean
from qadtr_brevitas.evaluation.report import AttackCell, EvaluationReport, ImageAttackFacts, PatchFacts, Rate
from qadtr_brevitas.reproduce.analyses.base import AnalysisContext
from qadtr_brevitas.reproduce.analyses.document import FacetValue, Record

AttackFacts: TypeAlias = PatchFacts | ImageAttackFacts
Facets: TypeAlias = Mapping[str, FacetValue]
FacetsOf: TypeAlias = Callable[[AttackCell, AttackFacts], Facets | None]
"""Returns the facets of a cell; None for a cell that is left out."""


def score(
    context: AnalysisContext,
    loaded: LoadedModel,
    *,
    patches: Sequence[NamedPatch] = (),
    attacks: Sequence[NamedAttack] = (),
    transfer: Transfer = "all",
) -> EvaluationReport:
    """Evaluate one model; finished cells are kept in the output folder.

    Args:
        context: the analysis.
        loaded: the model.
        patches: patches to score.
        attacks: attacks on each image to score.
        transfer: what is scored at precisions other than the one it was made at.
    """
    grid = Grid(
        loaded_models=[loaded],
        patches=patches,
        attacks=attacks,
        transfer=transfer,
        split=context.data.test,
        data_name=context.data.name,
        data_settings=context.data.settings,
        available=context.data.test.available,
        seed=context.seed,
        batch_size=context.batch_size,
    )
    return evaluate(grid, output=context.output, device=context.device, progress=context.progress)


def mean_records(
    report: EvaluationReport, what: str, rate: Callable[[AttackCell], Rate], facets_of: FacetsOf
) -> list[Record]:
    """Return the mean of a rate over cells with the same model, precision and facets, for instance over targets.

    Args:
        report: the evaluation.
        what: name of the rate in the records.
        rate: reads the rate of a cell.
        facets_of: returns the facets of a cell.
    """
    facts = report.attack_facts()
    groups: dict[tuple[object, ...], tuple[Facets, list[AttackCell]]] = {}
    for cell in report.cells:
        facets = facets_of(cell, facts[cell.attack])
        if facets is not None:
            key = (cell.model, cell.precision, *facets.items())
            groups.setdefault(key, (facets, []))[1].append(cell)
    return [_mean_record(what, rate, cells, facets) for facets, cells in groups.values()]


def clean_records(report: EvaluationReport, facets: Facets) -> list[Record]:
    """Return the accuracy without an attack at every precision, with the given facets."""
    return [
        Record(
            model=cell.model,
            precision=cell.precision,
            what="accuracy",
            value=cell.accuracy.value,
            low=cell.accuracy.low,
            high=cell.accuracy.high,
            n=cell.accuracy.n,
            facets=facets,
        )
        for cell in report.clean
    ]


def _mean_record(what: str, rate: Callable[[AttackCell], Rate], cells: Sequence[AttackCell], facets: Facets) -> Record:
    first, average = cells[0], mean([rate(cell).share for cell in cells])
    low, high = average.interval if average else (None, None)
    return Record(
        model=first.model,
        precision=first.precision,
        what=what,
        value=average.value if average else None,
        low=low,
        high=high,
        n=average.n[0] if average else 0,
        facets=facets,
    )
