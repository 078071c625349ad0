"""What a conversion did, as a table for the terminal."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from qadtr_brevitas.quant import ConversionReport

_FLOAT_NOTE = "stays float: "


def conversion_table(report: ConversionReport) -> Table:
    """One row for each layer, and below them what they add up to."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, caption_justify="left")
    for column in ("layer", "type", "parameters", "MACs (M)", "how"):
        table.add_column(column, justify="right" if column in ("parameters", "MACs (M)") else "left")
    for layer in report.layers:
        parameters = f"{layer.parameters:,}" if layer.parameters else ""
        macs = f"{layer.macs / 1e6:,.2f}" if layer.macs else ""
        table.add_row(layer.name, layer.type, parameters, macs, layer.note)
    table.caption = "\n".join(_summary(report))
    return table


def _summary(report: ConversionReport) -> list[str]:
    """What is covered, how large the weights are, and what stays float for which reasons."""
    macs = f"{percent(report.quantized_macs, report.macs)} of {report.macs / 1e6:,.1f} M multiply-accumulates (MACs)"
    sizes = ", ".join(f"{size / 1e6:.3g} MB at {precision}" for precision, size in report.sizes.items())
    reasons = Counter(layer.note.removeprefix(_FLOAT_NOTE) for layer in report.layers if not layer.quantized)
    return [
        "",
        f"quantized: {percent(report.quantized_share, 1)} of the parameters, {macs} of one image",
        f"weights: {sizes}",
        *(["not quantized:"] if reasons else []),
        *(f"{count:5} x {note}" for note, count in reasons.most_common()),
    ]


def percent(part: float, whole: float) -> str:
    """A share in percent, rounded down, so that 100 % leaves nothing out."""
    return f"{math.floor(1000 * part / whole) / 10 if whole else 0:.1f}%"
