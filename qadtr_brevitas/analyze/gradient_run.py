"""Adversarial images at the highest precision, gradients at all of them, and what is drawn of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qadtr_brevitas.analyze.base import Context, Findings, Picture, Record
from qadtr_brevitas.analyze.charts import Curve, Point, draw_curves
from qadtr_brevitas.analyze.gradient_measures import Average, cosines, input_gradients, squared_errors
from qadtr_brevitas.analyze.heat import heat
from qadtr_brevitas.analyze.patches import float_patches, put_on
from qadtr_brevitas.analyze.tables import by_precision, decimals
from qadtr_brevitas.evaluate.image_attacks import NamedAttack, SourcedAttack
from qadtr_brevitas.plots import Sheet, Tile, draw_sheet
from qadtr_brevitas.precision import Precision
from qadtr_brevitas.recipe.slots import slot_name
from qadtr_brevitas.sources import parse_access
from qadtr_brevitas.subjects import Subject

if TYPE_CHECKING:
    from qadtr_brevitas.analyze.gradients import Gradients

_FIGURES = ("cosine", "mse", "relative mse")
_NOTE = (
    "Gradient of the cross-entropy with the true class, on images attacked at {reference} bit, against the gradient at "
    "{reference} bit on the same images. Cosine and mse: means over images, the mse of values of gradients of single "
    "images. Relative mse: squared errors of all images as a share of the squared gradients at {reference} bit."
)


@dataclass(frozen=True)
class _Scene:
    """Attacked images, and the pixels to compare gradients on."""

    attack: str
    kind: str
    images: Tensor
    regions: dict[str, Tensor]


def run(analysis: Gradients, context: Context) -> Findings:
    """As `Gradients.run` says."""
    split = context.data.test.limited(analysis.images, seed=context.seed)
    images, labels = split.batch(torch.arange(len(split)), device=context.device)
    records: list[Record] = []
    rows: list[tuple[str, tuple[Tile | None, ...]]] = []
    for number, subject in enumerate(context.subjects):
        precisions = context.precisions(subject)
        scenes = list(_scenes(analysis, context, subject, precisions[0], images, labels))
        for part, scene in enumerate(scenes):
            context.progress(number * len(scenes) + part, len(context.subjects) * len(scenes), f"{subject.name}")
            found = {
                p: input_gradients(subject.model, p, scene.images, labels, batch_size=context.batch_size)
                for p in precisions
            }
            records += _records(subject.name, scene, found, precisions)
            rows.append(_row(subject.name, scene, found, precisions))
    columns = max((context.precisions(subject) for subject in context.subjects), key=len)
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
    analysis: Gradients, context: Context, subject: Subject, reference: Precision, images: Tensor, labels: Tensor
) -> Iterator[_Scene]:
    """The images under each attack."""
    patches = float_patches(context, subject, [analysis.attack], finished=analysis.patches, targets=analysis.targets)
    patched, covered = put_on(patches, images, seed=context.seed)
    whole = torch.ones_like(covered)
    name = ", ".join(dict.fromkeys(patch.facts.family for patch in patches))
    yield _Scene(name, "patch", patched, {"patch": covered, "image": whole, "zeros around the patch": covered})
    pixel = NamedAttack(slot_name(analysis.pixel), analysis.pixel)
    source = SourcedAttack(pixel, subject, parse_access(reference))
    parts = torch.arange(len(images)).split(context.batch_size)
    made = torch.cat(
        [
            source.images(images[part], labels[part], seed=context.seed, chunk=range(int(part[0]), int(part[-1]) + 1))
            for part in parts
        ]
    )
    yield _Scene(pixel.family, "pixel", made, {"patch": covered, "image": whole})


def _records(
    model: str, scene: _Scene, found: dict[Precision, Tensor], precisions: Sequence[Precision]
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
    model: str, scene: _Scene, found: dict[Precision, Tensor], precisions: Sequence[Precision]
) -> tuple[str, tuple[Tile | None, ...]]:
    """The first image and its gradients."""
    tiles = [Tile(heat(found[precision][0].abs().sum(dim=0))) for precision in precisions]
    return f"{model}\n{scene.attack}", (Tile(scene.images[0].cpu()), *tiles)


def _draw_maps(
    context: Context, rows: Sequence[tuple[str, tuple[Tile | None, ...]]], columns: Sequence[Precision]
) -> Picture:
    widest = len(columns) + 1
    sheet = Sheet(
        title="Size of the gradient at each pixel",
        columns=("image", *(f"{precision} bit" for precision in columns)),
        rows=tuple((label, (*tiles, *[None] * (widest - len(tiles)))) for label, tiles in rows),
        note="Each map is scaled to its own largest value.",
    )
    draw_sheet(sheet, context.output / "gradients.png")
    return Picture("gradients.png", "Size of the gradient at each pixel of the first image, at each precision.")


def _draw_cosines(context: Context, records: Sequence[Record], columns: Sequence[str]) -> Picture:
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
