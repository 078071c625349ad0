"""Draw what is proved: certified and defended accuracy against precision and against the size of the patch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadtr_brevitas.core.patch_size import PatchSize
from qadtr_brevitas.evaluation.report.layout import bits
from qadtr_brevitas.evaluation.report.plots import COLORS, new_figure, save_figure, tidy
from qadtr_brevitas.evaluation.report.schema import CertifiedCell, EvaluationReport, Rate
from qadtr_brevitas.quant.inference import sorted_modes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES: dict[str, dict[str, Any]] = {
    "certified": {"linestyle": "-", "marker": "o"},
    "defended, no patch": {"linestyle": "--", "marker": "s", "markerfacecolor": "white"},
}


def draw_certified(report: EvaluationReport, path: Path) -> Path:
    """Draw certified and defended accuracy against precision and, of several patch sizes, against the size.

    Raises:
        CheckpointError: the file cannot be written.
    """
    cells = report.certified
    precisions = sorted_modes({cell.precision for cell in cells})
    sizes = sorted({_pixels(cell) for cell in cells})
    panels = 1 + (len(sizes) > 1)
    figure = new_figure(width=max(6.5, 5.8 * panels), height=4.8)
    first, *second = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    places = {precision: float(number) for number, precision in enumerate(precisions)}
    _draw(first, cells, lambda cell: places[cell.precision], lambda cell: f"{cell.model}, {cell.label}")
    first.set_xticks(range(len(precisions)), precisions)
    first.set_xlabel("precision (bit)")
    first.set_ylabel("accuracy (%)")
    for axes in second:
        _draw(axes, cells, lambda cell: float(_pixels(cell)), _by_precision)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(pixels) for pixels in sizes])
        axes.minorticks_off()
        axes.set_xlabel("pixels of the patch")
    count = cells[0].certified_accuracy.n
    figure.suptitle(f"Certified and defended accuracy, {count} images, 95 % intervals", fontsize=11)
    return save_figure(figure, path)


def _draw(
    axes: Axes,
    cells: Sequence[CertifiedCell],
    place: Callable[[CertifiedCell], float],
    curve: Callable[[CertifiedCell], str],
) -> None:
    """Draw a curve of each kind for the cells of one name."""
    names = list(dict.fromkeys(map(curve, cells)))
    for number, name in enumerate(names):
        own = sorted((cell for cell in cells if curve(cell) == name), key=place)
        color = COLORS[number % len(COLORS)]
        for kind, style in _STYLES.items():
            rates = [cell.certified_accuracy if kind == "certified" else cell.clean_accuracy for cell in own]
            _curve(axes, list(map(place, own)), rates, color=color, label=f"{name}: {kind}", style=style)
    axes.set_ylim(-2, 102)
    tidy(axes)
    axes.legend(fontsize=7, frameon=False)


def _curve(
    axes: Axes, places: Sequence[float], rates: Sequence[Rate], *, color: str, label: str, style: dict[str, Any]
) -> None:
    shown = [(place, rate.value, rate) for place, rate in zip(places, rates, strict=True) if rate.value is not None]
    heights = [100 * value for _, value, _ in shown]
    below = [100 * (value - rate.low) for _, value, rate in shown]
    above = [100 * (rate.high - value) for _, value, rate in shown]
    axes.errorbar(
        [place for place, _, _ in shown], heights, [below, above], color=color, capsize=2.5, label=label, **style
    )


def _pixels(cell: CertifiedCell) -> int:
    return PatchSize.parse(cell.size).pixels


def _by_precision(cell: CertifiedCell) -> str:
    method = "" if cell.method == "double masking" else f", {cell.method}"
    return f"{cell.model} at {bits(cell.precision)}{method}"
