"""Runs clean and patched images through a network at every precision and compares what its layers put out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qadtr_brevitas.analyze.base import Context, Findings, Picture, Record
from qadtr_brevitas.analyze.feature_maps import change_at, choose_layers, covered_cells, recorded
from qadtr_brevitas.analyze.gradient_measures import Average, cosines
from qadtr_brevitas.analyze.heat import heat
from qadtr_brevitas.analyze.patches import float_patches, put_on
from qadtr_brevitas.analyze.tables import by_precision, decimals
from qadtr_brevitas.plots import Sheet, Tile, draw_sheet
from qadtr_brevitas.precision import Precision
from qadtr_brevitas.quant import at_precision
from qadtr_brevitas.subjects import Subject

if TYPE_CHECKING:
    from qadtr_brevitas.analyze.features import Features

_AT, _AWAY, _COSINE = "change at the patch", "change away from it", "cosine of the change"
_FIGURES = (_AT, _AWAY, _COSINE)
_NOTE = (
    "Means over images. Change: mean size of patched minus clean outputs, at the cells of the map that the patch "
    "touches and at the others, as a share of the mean size of the clean map. Cosine: of the change with the change at "
    "the highest precision."
)


@dataclass(frozen=True)
class _Maps:
    """Outputs of the layers at one precision, on clean and on patched images."""

    clean: dict[str, Tensor]
    patched: dict[str, Tensor]

    def first(self) -> _Maps:
        """Those of the first image."""
        return _Maps(*({name: output[:1] for name, output in part.items()} for part in (self.clean, self.patched)))


def run(analysis: Features, context: Context) -> Findings:
    """As `Features.run` says."""
    # A layer that is not there is told before patches are made.
    chosen = {s.name: choose_layers(s.model, analysis.layers, of=f"model {s.name}") for s in context.subjects}
    split = context.data.test.limited(analysis.images, seed=context.seed)
    images, _ = split.batch(torch.arange(len(split)), device=context.device)
    records: list[Record] = []
    pictures: list[Picture] = []
    for number, subject in enumerate(context.subjects):
        context.progress(number, len(context.subjects), subject.name)
        patches = float_patches(
            context, subject, [analysis.attack], finished=analysis.patches, targets=analysis.targets
        )
        found, maps = _measure(
            context, subject, chosen[subject.name], *put_on(patches, images, seed=context.seed), images
        )
        records += found
        pictures.append(_draw(context, subject, maps))
    return Findings(
        title="Feature maps with and without a patch",
        records=records,
        tables=[
            by_precision(f"Features: {what}", records, what, write=decimals(3), facets=("layer",), notes=(_NOTE,))
            for what in _FIGURES
        ],
        pictures=pictures,
    )


def _measure(
    context: Context,
    subject: Subject,
    layers: dict[str, nn.Module],
    patched: Tensor,
    covered: Tensor,
    images: Tensor,
) -> tuple[list[Record], dict[Precision, _Maps]]:
    """Every number, and the maps of the first image at each precision."""
    values: dict[tuple[Precision, str, str], list[Tensor]] = {}
    drawn: dict[Precision, _Maps] = {}
    # In portions: maps of all images and precisions together may be larger than the memory.
    for part in torch.arange(len(images), device=images.device).split(context.batch_size):
        maps = {p: _maps(subject, p, layers, images[part], patched[part]) for p in context.precisions(subject)}
        drawn = drawn or {precision: found.first() for precision, found in maps.items()}
        for where, found in _compare(maps, covered[part]):
            values.setdefault(where, []).append(found)
    records = [_record(subject.name, *where, torch.cat(found)) for where, found in values.items()]
    return records, drawn


def _maps(
    subject: Subject, precision: Precision, layers: dict[str, nn.Module], images: Tensor, patched: Tensor
) -> _Maps:
    with torch.no_grad(), at_precision(subject.model, precision), recorded(layers) as outputs:
        subject.model(images)
        clean = dict(outputs)
        subject.model(patched)
        return _Maps(clean, dict(outputs))


def _compare(maps: dict[Precision, _Maps], covered: Tensor) -> Iterator[tuple[tuple[Precision, str, str], Tensor]]:
    """Figures of every image, by precision, layer and name."""
    reference = next(iter(maps.values()))
    for precision, found in maps.items():
        for layer, clean in found.clean.items():
            change = found.patched[layer] - clean
            first = reference.patched[layer] - reference.clean[layer]
            region = covered_cells(covered, (clean.shape[-2], clean.shape[-1]))
            yield (precision, layer, _AT), change_at(change, clean, region)
            yield (precision, layer, _AWAY), change_at(change, clean, ~region)
            yield (precision, layer, _COSINE), cosines(change, first, torch.ones_like(region))


def _record(model: str, precision: Precision, layer: str, what: str, values: Tensor) -> Record:
    # Where a map is covered whole there is nothing away from the patch.
    average = Average.of(values[values.isfinite()].double())
    return Record(
        model=model,
        precision=str(precision),
        what=what,
        value=average.value,
        low=average.low,
        high=average.high,
        n=average.n,
        facets={"layer": layer},
    )


def _draw(context: Context, subject: Subject, maps: dict[Precision, _Maps]) -> Picture:
    """The first image's maps; every layer has one scale, so that precisions can be compared by eye."""
    layers = list(next(iter(maps.values())).clean)
    rows = [row for layer in layers for row in _rows(layer, list(maps.values()))]
    file = f"features-{subject.name.replace('/', '-')}.png"
    sheet = Sheet(
        title=f"{subject.name}: feature maps of one image",
        columns=tuple(f"{precision} bit" for precision in maps),
        rows=tuple(rows),
        note="Mean size over channels; the brightest color is the largest value of the layer.",
    )
    draw_sheet(sheet, context.output / file)
    return Picture(file, f"Feature maps of the first image in {subject.name}, clean and patched, at each precision.")


def _rows(layer: str, maps: Sequence[_Maps]) -> Iterator[tuple[str, tuple[Tile, ...]]]:
    sizes = {
        kind: [getattr(found, kind)[layer][0].abs().mean(dim=0) for found in maps] for kind in ("clean", "patched")
    }
    most = max(float(size.max()) for found in sizes.values() for size in found)
    for kind, found in sizes.items():
        yield f"{layer}\n{kind}", tuple(Tile(heat(size, most=most)) for size in found)
