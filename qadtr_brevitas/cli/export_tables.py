"""What `export` prints: agreement, hardware cost, and both side by side where there are several precisions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qadtr_brevitas.core.table import Table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qadtr_brevitas.exporting import ExportReport
    from qadtr_brevitas.exporting.estimate import Emulation, Estimate
    from qadtr_brevitas.exporting.integers import IntegerLayers

_SHOWN = 4
_RESOURCES = (("lut", "LUT"), ("bram_18k", "BRAM 18k"), ("uram", "URAM"), ("dsp", "DSP"))


def export_tables(reports: Sequence[ExportReport]) -> RenderableType:
    """All that is to be said of the exports of one model."""
    from rich.console import Group

    parts = [part for report in reports for part in _parts(report)]
    if len(reports) > 1:
        parts.append(_side_by_side(reports).rich())
    return Group(*parts)


def _parts(report: ExportReport) -> Iterator[RenderableType]:
    from rich.text import Text

    size = (
        f"{report.format} at {report.precision}: {report.bytes / 1e6:.3g} MB, weights {_weights(report)} at their bits"
    )
    yield Text(size if report.agreement else f"{size}, not verified")
    if report.integers is not None:
        yield Text(_integers(report.integers))
    if report.agreement is not None:
        yield _agreement(report).rich()
    if report.emulation is not None:
        yield Text(_emulation(report.emulation))
    if report.defense is not None:
        yield Text(" ".join(report.defense.sentences()))
    if report.estimate is not None:
        yield _costs(report).rich()


def _integers(found: IntegerLayers) -> str:
    """Word how many layers compute in integers, and what keeps the others, each reason once."""
    layers: dict[str, list[str]] = {}
    for layer, reason in found.kept.items():
        layers.setdefault(reason, []).append(layer)
    lines = [f"{found.integer} of {found.layers} layers compute in integers"]
    for reason, names in layers.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines.append(f"  {', '.join(names[:_SHOWN])}{more}: {reason}")
    return "\n".join(lines)


def _agreement(report: ExportReport) -> Table:
    found = report.agreement
    assert found is not None
    baseline = report.baseline
    rows = [
        ("accuracy (%)", f"{100 * found.accuracy:.1f}", f"{100 * found.exported_accuracy:.1f}"),
        *([("accuracy in float (%)", "", f"{100 * baseline:.1f}")] if baseline is not None else []),
        *((f"ASR of {p.name} (%)", f"{100 * p.asr:.1f}", f"{100 * p.exported_asr:.1f}") for p in found.patches),
    ]
    notes = [
        found.sentence(),
        f"{found.images} test images, the same class for {found.same_class:.1%}. Largest difference of two logits: "
        f"{found.median_difference:.2g} in the median image, {found.max_difference:.2g} in any (the network with sums "
        f"rounded otherwise: {found.own_median:.2g} and {found.own_difference:.2g}); the largest logit is "
        f"{found.largest_logit:.3g}.",
    ]
    if (ties := report.ties) is not None:
        notes.append(
            f"FINN rounds ties up: {ties.ties} of {ties.values} values lie halfway between two levels; "
            f"{ties.same_class:.1%} of the images keep their class, and no logit changes by more than "
            f"{ties.max_difference:.2g}."
        )
    return Table("Exported file against PyTorch", ("", "PyTorch", "exported"), tuple(rows), tuple(notes))


def _emulation(found: Emulation) -> str:
    """Word what a compiler itself computed."""
    steps = ", ".join(f"{difference:.2g} {step}" for step, difference in found.differences.items())
    return (
        f"{found.compiler} {found.version} itself computes {found.images} image as the network does. Largest "
        f"difference: {steps}; the largest logit is {found.largest:.3g}. Nothing was synthesized."
    )


def _costs(report: ExportReport) -> Table:
    found = report.estimate
    assert found is not None
    rows = [
        (layer.name, *(f"{getattr(layer, key):g}" for key, _ in _RESOURCES), f"{layer.cycles}")
        for layer in found.layers
    ]
    rows.append(("total", *(f"{found.total(key):g}" for key, _ in _RESOURCES), ""))
    if found.available:
        rows.append((f"{found.board} has", *(f"{found.available[key]:g}" for key, _ in _RESOURCES), ""))
        rows.append(("fits", *_fits(found), ""))
    notes = [*_board_notes(found), *_uncounted_notes(found)]
    note = (
        f"FINN's estimates without synthesis: {found.fps:.0f} images/s and {found.latency_ns / 1e6:.2f} ms from image "
        f"to logits at {1e3 / found.clock_ns:.0f} MHz; the layer with the most cycles sets the pace."
    )
    header = ("layer", *(name for _, name in _RESOURCES), "cycles")
    return Table(f"Cost of {report.precision} on an FPGA", header, tuple(rows), (note, *notes))


def _fits(found: Estimate) -> Iterator[str]:
    for key, _ in _RESOURCES:
        yield "yes" if found.total(key) <= found.available[key] else "NO"


def _board_notes(found: Estimate) -> Iterator[str]:
    if found.fits is None:
        yield f"FINN does not tell what a {found.board} has: whether the network fits is not known."
    elif not found.fits:
        over = [name for key, name in _RESOURCES if found.total(key) > found.available[key]]
        yield (
            f"It does NOT fit a {found.board}: too much of {', '.join(over)}. Fewer bits, a smaller network, or a "
            "larger board with --board; fewer images a second with --fps save tables and multipliers, but no memory."
        )
    else:
        yield f"By these estimates it fits a {found.board}; the rest of a design, about its DMA, comes on top."


def _uncounted_notes(found: Estimate) -> Iterator[str]:
    if found.uncounted:
        shown = ", ".join(found.uncounted[:_SHOWN])
        more = f" and {len(found.uncounted) - _SHOWN} more" if len(found.uncounted) > _SHOWN else ""
        yield f"FINN counts no LUT for {shown}{more}: what these take is left out. So are FIFOs between the layers."


def _side_by_side(reports: Sequence[ExportReport]) -> Table:
    costs = any(report.estimate is not None for report in reports)
    header = ("precision", "accuracy (%)", "mean ASR (%)", "weights (MB)", "file (MB)")
    header = (*header, *(name for _, name in _RESOURCES), "images/s") if costs else header
    return Table("Precisions side by side", header, tuple(_row(report, costs=costs) for report in reports), ())


def _row(report: ExportReport, *, costs: bool) -> tuple[str, ...]:
    agreement, estimate = report.agreement, report.estimate
    patches = () if agreement is None else agreement.patches
    asr = f"{100 * sum(p.exported_asr for p in patches) / len(patches):.1f}" if patches else "-"
    accuracy = "-" if agreement is None else f"{100 * agreement.exported_accuracy:.1f}"
    row = (report.precision, accuracy, asr, _weights(report).removesuffix(" MB"), f"{report.bytes / 1e6:.3g}")
    if not costs or estimate is None:
        return row
    return (*row, *(f"{estimate.total(key):g}" for key, _ in _RESOURCES), f"{estimate.fps:.0f}")


def _weights(report: ExportReport) -> str:
    return f"{report.weight_bytes / 1e6:.3g} MB"
