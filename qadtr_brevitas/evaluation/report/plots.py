"""Draw the pictures of a report: ASR against bit-width, the patches, and patched images with their predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from qadtr_brevitas.core.extras import require
from qadtr_brevitas.core.files import write_atomically
from qadtr_brevitas.evaluation.metrics import Mean
from qadtr_brevitas.evaluation.report import EvaluationReport, PatchFacts
from qadtr_brevitas.evaluation.report.views import FLOAT, View, attacked_precisions, families
from qadtr_brevitas.quant.inference import sorted_modes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which color-blind readers tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DPI = 150


def new_figure(*, width: float, height: float) -> Figure:
    """Return an empty figure, in inches."""
    require("matplotlib", extra="report", purpose="drawing")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it would pick a window system and keep every figure alive.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=_DPI, format="png", facecolor="white"))
    return path


def tidy(axes: Axes) -> None:
    """Draw faint horizontal lines behind the curves, and no frame where there is no scale."""
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


_VERDICTS = {"right": "#00704F", "target": "#C00000", "wrong": "#B35900"}
_INCHES_PER_TILE = 1.15
_PANELS_ACROSS = 3
_OWN = "made at the precision attacked"
_EOT = "made on a mean over precisions"


@dataclass(frozen=True)
class Tile:
    """One small picture of a sheet.

    Args:
        image: (3, H, W) or, with transparency, (4, H, W), in [0, 1].
        caption: text below it.
        verdict: color of the caption: green for right, red for the attack's target, orange for another wrong class.
    """

    image: Tensor
    caption: str = ""
    verdict: Literal["right", "target", "wrong"] | None = None


@dataclass(frozen=True)
class ImageGrid:
    """Small pictures in labeled rows under column titles; None leaves a place empty."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Tile | None, ...]], ...]
    note: str = ""


def draw_asr(report: EvaluationReport, path: Path) -> Path:
    """Draw ASR against precision, a panel for each kind of attack.

    Each model has a curve for attacks made at the precision attacked, those made at 32 bit, those made on means
    over precisions, and the random patch.

    Raises:
        CheckpointError: the file cannot be written.
    """
    shown = families(report)
    columns = attacked_precisions(report)
    across = min(_PANELS_ACROSS, len(shown))
    down = math.ceil(len(shown) / across)
    figure = new_figure(width=max(8.0, 5.6 * across), height=0.6 + 4.2 * down)
    from matplotlib.lines import Line2D

    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    panels = list(grid.flat)[: len(shown)]
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_axis_off()
    styles: dict[str, dict[str, Any]] = {
        _OWN: {"linestyle": "-", "marker": "o"},
        "made at 32 bit": {"linestyle": "--", "marker": "s", "markerfacecolor": "white"},
        _EOT: {"linestyle": "-.", "marker": "^", "markerfacecolor": "white"},
        "random patch": {"linestyle": ":", "marker": "x"},
    }
    if not any(cell.threat == "eot" for cell in report.cells):
        del styles[_EOT]
    for axes, family in zip(panels, shown, strict=True):
        for number, model in enumerate(report.models):
            view, color = View(report, model, family), COLORS[number % len(COLORS)]
            curves = {
                _OWN: [view.white_box(p) for p in columns],
                "made at 32 bit": [view.made_at(p, FLOAT) for p in columns],
                _EOT: [view.eot(p) for p in columns],
                "random patch": [view.control(p) for p in columns],
            }
            for kind, (label, style) in enumerate(styles.items()):
                # Side by side, or the intervals of different curves would hide each other.
                curves_in_all = len(styles) * len(report.models)
                shift = min(0.09, 0.8 / curves_in_all) * (len(styles) * number + kind - (curves_in_all - 1) / 2)
                _curve(axes, curves[label], color=color, shift=shift, style=style)
        _precision_axis(axes, columns)
        axes.set_title(family)
    for axes in grid[:, 0]:
        axes.set_ylabel("attack success rate (%)")
    models = [
        Line2D([], [], color=COLORS[number % len(COLORS)], linewidth=4, label=model.name)
        for number, model in enumerate(report.models)
    ]
    kinds = [Line2D([], [], color="#444444", label=kind, **style) for kind, style in styles.items()]
    figure.legend(handles=[*models, *kinds], loc="outside lower center", ncols=min(5, len(models) + 3), frameon=False)
    figure.suptitle(f"ASR against precision, {report.data.images} images, 95 % intervals", fontsize=11)
    return save_figure(figure, path)


def draw_patches(report: EvaluationReport, textures: dict[str, Tensor], path: Path) -> Path:
    """Draw the patches, a row for each model and target and a column for each precision they were made at.

    Patches that were all made at one precision have a column for each target instead.

    Args:
        report: says what each patch is.
        textures: name of the patch -> (4, h, w) in [0, 1], red, green, blue and opacity.
        path: the PNG to write.

    Raises:
        CheckpointError: the file cannot be written.
    """
    shown = [patch for patch in report.patches if patch.name in textures]
    precisions = sorted_modes({patch.source.precision for patch in shown if patch.source})
    # A single column of pictures would be as long as there are patches.
    by_aim = len(precisions) < 2
    columns = list(dict.fromkeys(_aim(patch, report) for patch in shown)) if by_aim else precisions
    rows: dict[str, list[Tile | None]] = {}
    for patch in sorted(shown, key=lambda patch: (patch.family, patch.source.name if patch.source else "")):
        label = [patch.source.name if patch.source else "unknown model", patch.family]
        if not by_aim:
            label.append(f"aims at {_aim(patch, report)}")
        tiles = rows.setdefault("\n".join(label), [None] * len(columns))
        column = _aim(patch, report) if by_aim else patch.source.precision if patch.source else columns[0]
        tiles[columns.index(column)] = Tile(textures[patch.name])
    made = f"made at {precisions[0]} bit, by what they aim at" if precisions else "by what they aim at"
    sheet = ImageGrid(
        title=f"Patches {made}" if by_aim else "Patches, by the precision they were made at",
        columns=tuple(column if by_aim else f"{column} bit" for column in columns),
        rows=tuple((label, tuple(tiles)) for label, tiles in rows.items()),
    )
    return draw_sheet(sheet, path)


def draw_sheet(sheet: ImageGrid, path: Path) -> Path:
    """Draw small pictures in labeled rows, enlarged without smoothing.

    Raises:
        CheckpointError: the file cannot be written.
    """
    across, down = len(sheet.columns), len(sheet.rows)
    captioned = any(tile and tile.caption for _, tiles in sheet.rows for tile in tiles)
    tall = _INCHES_PER_TILE + (0.15 if captioned else 0.05)
    label = 0.09 * max(len(line) for text, _ in sheet.rows for line in text.split("\n"))
    width = max(4.5, label + _INCHES_PER_TILE * across)
    title, note = fill(sheet.title, int(11 * width)), fill(sheet.note, int(15 * width))
    figure = new_figure(width=width, height=0.9 + tall * down + 0.17 * (title.count("\n") + note.count("\n")))
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, (text, tiles) in zip(grid, sheet.rows, strict=True):
        for axes, tile in zip(row, tiles, strict=True):
            if tile is None:
                continue
            _frame(axes)
            axes.imshow(tile.image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            color = _VERDICTS[tile.verdict] if tile.verdict else "black"
            axes.text(
                0.5, -0.04, tile.caption, color=color, fontsize=8, ha="center", va="top", transform=axes.transAxes
            )
        row[0].text(-0.08, 0.5, text, fontsize=8, ha="right", va="center", transform=row[0].transAxes)
    for axes, column in zip(grid[0], sheet.columns, strict=True):
        axes.set_title(column, fontsize=8)
    figure.suptitle(title, fontsize=11)
    if note:
        figure.supxlabel(note, fontsize=8)
    return save_figure(figure, path)


def _frame(axes: Axes) -> None:
    """Return a thin frame, without which light pictures have no edge."""
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color="#999999", linewidth=0.6)


def _curve(axes: Axes, means: Sequence[Mean | None], *, color: str, shift: float, style: dict[str, Any]) -> None:
    points = [(x, value) for x, value in enumerate(means) if value]
    if not points:
        return
    heights = [100 * value.value for _, value in points]
    below = [100 * (value.value - value.interval[0]) for _, value in points]
    above = [100 * (value.interval[1] - value.value) for _, value in points]
    places = [x + shift for x, _ in points]
    axes.errorbar(places, heights, [below, above], color=color, capsize=2.5, linewidth=1.5, elinewidth=1, **style)


def _precision_axis(axes: Axes, columns: Sequence[str]) -> None:
    axes.set_xticks(range(len(columns)), columns)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(-2, 102)
    axes.set_xlabel("precision attacked (bit)")
    tidy(axes)


def _aim(patch: PatchFacts, report: EvaluationReport) -> str:
    return "any wrong class" if patch.target is None else report.data.classes[patch.target]
