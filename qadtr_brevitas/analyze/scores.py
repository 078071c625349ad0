"""Patches and attacks scored by the evaluation, cell by cell, and the means over them as records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from qadtr_brevitas.analyze.base import Context, Record
from qadtr_brevitas.evaluate import Grid, evaluate
from qadtr_brevitas.metrics import mean
from qadtr_brevitas.report import AttackCell, ImageAttackFacts, PatchFacts, Rate, Report
from qadtr_brevitas.subjects import Subject

Facets: TypeAlias = "Mapping[str, Any] | None"
"""What a cell's figure is told apart by; None for a cell that does not count."""


def score(context: Context, subject: Subject, **grid: Any) -> Report:
    """The evaluation of one model; its finished cells are kept in the output folder.

    Args:
        context: of the analysis.
        subject: the model.
        grid: further arguments of `Grid`.
    """
    plan = Grid(
        subjects=[subject],
        split=context.data.test,
        data_name=context.data.name,
        data_settings=context.data.settings,
        available=context.data.test.available,
        seed=context.seed,
        batch_size=context.batch_size,
        **grid,
    )
    return evaluate(plan, output=context.output, device=context.device, progress=context.progress)


def records(
    report: Report,
    what: str,
    figure: Callable[[AttackCell], Rate],
    facets: Callable[[AttackCell, PatchFacts | ImageAttackFacts], Facets],
) -> list[Record]:
    """Means of a figure over the cells that share model, precision and facets, for instance over targets.

    Args:
        report: the evaluation.
        what: how the figure is called.
        figure: the figure of a cell.
        facets: what tells cells apart.
    """
    by_name = report.attack_facts()
    groups: dict[tuple[Any, ...], list[AttackCell]] = {}
    told: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for cell in report.cells:
        found = facets(cell, by_name[cell.attack])
        if found is not None:
            key = (cell.model, cell.precision, *found.items())
            groups.setdefault(key, []).append(cell)
            told[key] = found
    return [_record(what, figure, cells, told[key]) for key, cells in groups.items()]


def _record(
    what: str, figure: Callable[[AttackCell], Rate], cells: Sequence[AttackCell], facets: Mapping[str, Any]
) -> Record:
    first, average = cells[0], mean([figure(cell).share for cell in cells])
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


def clean_records(report: Report, **facets: Any) -> list[Record]:
    """Accuracy without an attack."""
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
