"""Which tables a report consists of."""

from __future__ import annotations

from qadtr_brevitas.report.layout import Table
from qadtr_brevitas.report.matrices import model_matrix, precision_matrices, size_tables, variant_tables
from qadtr_brevitas.report.schema import Report
from qadtr_brevitas.report.summaries import (
    attacks_table,
    certified_table,
    clean_table,
    summary_table,
    white_box_table,
    worst_case_table,
)
from qadtr_brevitas.report.views import families


def tables(report: Report) -> list[Table]:
    """All tables, the ones to read first in front."""
    found = [*_comparison(report), clean_table(report)]
    for family in families(report):
        found.append(white_box_table(report, family))
        found += precision_matrices(report, family)
    return found


def terminal_tables(report: Report) -> list[Table]:
    """The tables worth a screen: all of one model under one or two kinds of attack, else what compares."""
    count = len(families(report))
    return _comparison(report) if count > 2 or (count and len(report.models) > 1) else tables(report)


def _comparison(report: Report) -> list[Table]:
    found = [attacks_table(report)] if len(families(report)) > 1 else []
    found += [summary_table(report, family) for family in families(report)]
    found += [worst_case_table(report)] if report.worst_case else []
    found += [certified_table(report)] if report.certified else []
    for family in families(report):
        found += model_matrix(report, family)
    found += size_tables(report)
    for family in families(report):
        found += variant_tables(report, family)
    return found
