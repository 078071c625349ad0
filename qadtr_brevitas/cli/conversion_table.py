"""What a conversion did, as a table for the terminal."""

from __future__ import annotations

import math
from collections import Counter
from itertools import filterfalse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from qadtr_brevitas.quant import ConversionReport, LayerReport

_FLOAT_NOTE = "stays float: "
_IDLE = ("Identity", "Dropout", "DropPath")


def conversion_table(report: ConversionReport) -> Table:
    """One row for each layer that does something to its input, and below them what all add up to."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, caption_justify="left")
    for column in ("layer", "type", "parameters", "MACs (M)", "how"):
        table.add_column(column, justify="right" if column in ("parameters", "MACs (M)") else "left")
    for layer in filterfalse(_is_idle, report.layers):
        parameters = f"{layer.parameters:,}" if layer.parameters else ""
        macs = f"{layer.macs / 1e6:,.2f}" if layer.macs else ""
        table.add_row(layer.name, layer.type, parameters, macs, layer.note)
    table.caption = "\n".join(_summary(report))
    return table


def _is_idle(layer: LayerReport) -> bool:
    """Half of the modules of a transformer are an Identity, a Dropout or a DropPath."""
    return layer.type in _IDLE and not (layer.quantized or layer.parameters)


def _summary(report: ConversionReport) -> list[str]:
    """Return what is covered, how large the weights are, and what stays float for which reasons."""
    macs = f"{percent(report.quantized_macs, report.macs)} of {report.macs / 1e6:,.1f} M multiply-accumulates (MACs)"
    sizes = ", ".join(f"{size / 1e6:.3g} MB at {precision}" for precision, size in report.sizes.items())
    kept = [layer for layer in report.layers if not layer.quantized]
    reasons = Counter(layer.note.removeprefix(_FLOAT_NOTE) for layer in kept if not _is_idle(layer))
    idle = sum(map(_is_idle, kept))
    return [
        "",
        f"quantized: {percent(report.quantized_share, 1)} of the parameters, {macs} of one image",
        f"weights: {sizes} (each at its own bits, with statistics and scales; an ONNX file may keep more)",
        *(["not quantized:"] if kept else []),
        *(f"{count:5} x {note}" for note, count in reasons.most_common()),
        *([f"{idle:5} x {', '.join(_IDLE)}: pass values through, not listed"] if idle else []),
    ]


def percent(part: float, whole: float) -> str:
    """Return a share in percent, rounded down, so that 100 % leaves nothing out."""
    return f"{math.floor(1000 * part / whole) / 10 if whole else 0:.1f}%"
