"""Gradients of a loss at one precision against those at the highest: do attacks look the same way?

How far gradients at two precisions agree.

Adversarial images at the highest precision, gradients at all of them, and what is drawn of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qadtr_brevitas.config.slots import Slot, slot_name
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.registry import ATTACKS
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.image_attacks import NamedAttack, SourcedAttack
from qadtr_brevitas.evaluation.report.plots import ImageGrid, Tile, draw_sheet
from qadtr_brevitas.quant.inference import logits_at, parse_mode
from qadtr_brevitas.reproduce.analyses.base import Analysis, AnalysisContext, Findings, Picture, Record
from qadtr_brevitas.reproduce.analyses.charts import Curve, Point, by_precision, decimals, draw_curves, heat
from qadtr_brevitas.reproduce.analyses.patches import float_patches, put_on


@plugin
class Gradients(Analysis):
    """Cosine and mean squared error of input gradients between precisions (paper, Figure 4).

    Adversarial images are made at the highest precision, 32 bit where the model has it: with universal patches, and
    with a pixel attack. On the same images the gradient of the cross-entropy with the true class, which both attacks
    drive up, is taken at every precision and compared with the one at the highest: on the pixels of the patch, on the
    whole image, and, for the patch, on the whole image with zeros around the patch, which is all that an attacker with
    a patch uses and makes errors look small by adding pixels without any.
    """

    patches: Annotated[
        tuple[str, ...], Field(description="finished patches, files or folders; none: make them with attack")
    ] = ()
    attack: Annotated[Any, Slot(ATTACKS), Field(description="patch attack, used where no patches are given")] = "lavan"
    targets: Annotated[
        tuple[int, ...] | None, Field(description="classes that patches are made for; null: the first three")
    ] = (0,)
    pixel: Annotated[Any, Slot(ATTACKS), Field(description="attack on every pixel")] = "pgd"
    images: Annotated[int, Field(ge=1, description="at most so many test images, class-balanced")] = 200

    def run(self, context: AnalysisContext) -> Findings:
        """Measures, and draws gradients.png and cosine.png."""
        return run(self, context)


_NORMAL = 1.96


@dataclass(frozen=True)
class Average:
    """A mean over images with its 95 % interval, which is None for a figure that is no mean."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Average:
        """The mean of (n,) values, by the normal approximation."""
        n = len(values)
        if n == 0:
            return cls(None, None, None, 0)
        value = float(values.mean())
        margin = _NORMAL * float(values.std()) / n**0.5 if n > 1 else None
        return cls(value, None if margin is None else value - margin, None if margin is None else value + margin, n)


def input_gradients(
    model: nn.Module, precision: Precision, images: Tensor, labels: Tensor, *, batch_size: int
) -> Tensor:
    """Gradient of each image's cross-entropy with its label, (N, 3, H, W).

    Args:
        model: a switchable model in eval mode and `frozen_weights`.
        precision: where to take it.
        images: (N, 3, H, W) in [0, 1].
        labels: (N,).
        batch_size: images in one pass.
    """
    logits = logits_at(model, parse_mode(precision))
    parts: list[Tensor] = []
    for some, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        inputs = some.detach().clone().requires_grad_(True)
        # The sum: a mean would make each image's gradient depend on how many there are.
        loss = F.cross_entropy(logits(inputs), truth, reduction="sum")
        parts += torch.autograd.grad(loss, inputs)
    return torch.cat(parts)


def cosines(gradients: Tensor, reference: Tensor, region: Tensor) -> Tensor:
    """Cosine of the angle between two gradients of every image, (n,); images where one of them is zero are left out.

    Args:
        gradients: (N, 3, H, W).
        reference: (N, 3, H, W).
        region: boolean (N, 1, H, W), the pixels that count.
    """
    ours, theirs = ((g * region).flatten(1).cpu().double() for g in (gradients, reference))
    norms = ours.norm(dim=1) * theirs.norm(dim=1)
    there = norms > 0
    return (ours * theirs).sum(dim=1)[there] / norms[there]


def squared_errors(gradients: Tensor, reference: Tensor, region: Tensor) -> tuple[Tensor, float | None]:
    """Mean squared difference of every image's two gradients, (N,); and their sum as a share of the reference's.

    The share says what the errors alone do not: gradients of confident images are tiny, and so are their errors. It is
    None where the reference has no gradient at all.
    """
    difference = ((gradients - reference) * region).flatten(1).cpu().double().square().sum(dim=1)
    size = (reference * region).flatten(1).cpu().double().square().sum(dim=1)
    values = region.flatten(1).sum(dim=1).cpu() * gradients.shape[1]
    total = float(size.sum())
    return difference / values, float(difference.sum()) / total if total else None


_FIGURES = ("cosine", "mse", "relative mse")
_NOTE = (
    "Gradient of the cross-entropy with the true class, on images attacked at {reference} bit, against the gradient at "
    "{reference} bit on the same images. Cosine and mse: means over images, the mse of values of gradients of single "
    "images. Relative mse: squared errors of all images as a share of the squared gradients at {reference} bit."
)


@dataclass(frozen=True)
class _AttackedImages:
    """Attacked images, and the pixels to compare gradients on."""

    attack: str
    kind: str
    images: Tensor
    regions: dict[str, Tensor]


def run(analysis: Gradients, context: AnalysisContext) -> Findings:
    """As `Gradients.run` says."""
    split = context.data.test.limited(analysis.images, seed=context.seed)
    images, labels = split.batch(torch.arange(len(split)), device=context.device)
    records: list[Record] = []
    rows: list[tuple[str, tuple[Tile | None, ...]]] = []
    for number, loaded in enumerate(context.loaded_models):
        precisions = context.precisions(loaded)
        scenes = list(_scenes(analysis, context, loaded, precisions[0], images, labels))
        for part, scene in enumerate(scenes):
            context.progress(number * len(scenes) + part, len(context.loaded_models) * len(scenes), f"{loaded.name}")
            found = {
                p: input_gradients(loaded.model, p, scene.images, labels, batch_size=context.batch_size)
                for p in precisions
            }
            records += _records(loaded.name, scene, found, precisions)
            rows.append(_row(loaded.name, scene, found, precisions))
    columns = max((context.precisions(loaded) for loaded in context.loaded_models), key=len)
    reference = str(columns[0])
    pictures = [
        _draw_maps(context, rows, columns),
        _draw_cosines(context, records, [str(precision) for precision in columns[1:]]),
    ]
    note = _NOTE.format(reference=reference)
    tables = [
        by_precision(
            f"Gradients: {figure}", records, figure, write=decimals(4), facets=("attack", "region"), notes=(note,)
        )
        for figure in _FIGURES
    ]
    return Findings(
        title=f"Gradients at each precision against those at {reference} bit",
        records=records,
        tables=tables,
        pictures=pictures,
    )


def _scenes(
    analysis: Gradients,
    context: AnalysisContext,
    loaded: LoadedModel,
    reference: Precision,
    images: Tensor,
    labels: Tensor,
) -> Iterator[_AttackedImages]:
    """The images under each attack."""
    patches = float_patches(context, loaded, [analysis.attack], finished=analysis.patches, targets=analysis.targets)
    patched, covered = put_on(patches, images, seed=context.seed)
    whole = torch.ones_like(covered)
    name = ", ".join(dict.fromkeys(patch.facts.family for patch in patches))
    yield _AttackedImages(name, "patch", patched, {"patch": covered, "image": whole, "zeros around the patch": covered})
    pixel = NamedAttack(slot_name(analysis.pixel), analysis.pixel)
    source = SourcedAttack(pixel, loaded, parse_mode(reference))
    parts = torch.arange(len(images)).split(context.batch_size)
    made = torch.cat(
        [
            source.images(images[part], labels[part], seed=context.seed, chunk=range(int(part[0]), int(part[-1]) + 1))
            for part in parts
        ]
    )
    yield _AttackedImages(pixel.family, "pixel", made, {"patch": covered, "image": whole})


def _records(
    model: str, scene: _AttackedImages, found: dict[Precision, Tensor], precisions: Sequence[Precision]
) -> Iterator[Record]:
    reference = found[precisions[0]]
    for precision in precisions[1:]:
        for region, pixels in scene.regions.items():
            facets = {"attack": scene.attack, "kind": scene.kind, "region": region}
            errors, share = squared_errors(found[precision], reference, pixels)
            if region == "zeros around the patch":
                # The same errors over all pixels of the image.
                errors = errors * pixels.flatten(1).cpu().double().mean(dim=1)
            measured = {
                "cosine": Average.of(cosines(found[precision], reference, pixels)),
                "mse": Average.of(errors),
                "relative mse": Average(share, None, None, len(errors)),
            }
            for what, average in measured.items():
                yield Record(model=model, precision=str(precision), what=what, facets=facets, **_fields(average))


def _fields(average: Average) -> dict[str, Any]:
    return {"value": average.value, "low": average.low, "high": average.high, "n": average.n}


def _row(
    model: str, scene: _AttackedImages, found: dict[Precision, Tensor], precisions: Sequence[Precision]
) -> tuple[str, tuple[Tile | None, ...]]:
    """The first image and its gradients."""
    tiles = [Tile(heat(found[precision][0].abs().sum(dim=0))) for precision in precisions]
    return f"{model}\n{scene.attack}", (Tile(scene.images[0].cpu()), *tiles)


def _draw_maps(
    context: AnalysisContext, rows: Sequence[tuple[str, tuple[Tile | None, ...]]], columns: Sequence[Precision]
) -> Picture:
    widest = len(columns) + 1
    sheet = ImageGrid(
        title="Size of the gradient at each pixel",
        columns=("image", *(f"{precision} bit" for precision in columns)),
        rows=tuple((label, (*tiles, *[None] * (widest - len(tiles)))) for label, tiles in rows),
        note="Each map is scaled to its own largest value.",
    )
    draw_sheet(sheet, context.output / "gradients.png")
    return Picture("gradients.png", "Size of the gradient at each pixel of the first image, at each precision.")


def _draw_cosines(context: AnalysisContext, records: Sequence[Record], columns: Sequence[str]) -> Picture:
    curves: dict[str, list[Point | None]] = {}
    for record in records:
        if record.what == "cosine" and record.facets["region"] != "zeros around the patch":
            label = f"{record.model}: {record.facets['attack']}, on the {record.facets['region']}"
            points = curves.setdefault(label, [None] * len(columns))
            if record.value is not None:
                points[columns.index(record.precision)] = Point(record.value, record.low, record.high)
    draw_curves(
        [Curve(label, points) for label, points in curves.items()],
        columns,
        context.output / "cosine.png",
        x_label="precision (bit)",
        y_label="cosine with the highest precision",
    )
    return Picture("cosine.png", "Cosine of gradients with those at the highest precision, with 95 % intervals.")
