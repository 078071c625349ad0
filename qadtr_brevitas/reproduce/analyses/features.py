"""Feature maps with and without a patch: whether the effect of a patch inside a network survives fewer bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.report.plots import ImageGrid, Tile, draw_sheet
from qadtr_brevitas.quant import at_precision
from qadtr_brevitas.reproduce.analyses.base import (
    Analysis,
    AnalysisContext,
    CraftingAttack,
    Findings,
    PatchFiles,
    TargetClasses,
)
from qadtr_brevitas.reproduce.analyses.charts import heat_map
from qadtr_brevitas.reproduce.analyses.document import Picture, Record
from qadtr_brevitas.reproduce.analyses.layers import choose_layers, recorded_outputs
from qadtr_brevitas.reproduce.analyses.patches import apply_in_turn, reference_patches
from qadtr_brevitas.reproduce.analyses.similarity import Average, cosines
from qadtr_brevitas.reproduce.analyses.tables import decimals, precision_table

_AT_PATCH, _ELSEWHERE, _COSINE = "change at the patch", "change away from it", "cosine of the change"
_NOTE = (
    "Means over images. Change: mean size of patched minus clean outputs, at the cells of the map that the patch "
    "touches and at the others, as a share of the mean size of the clean map. Cosine: of the change with the change at "
    "the highest precision."
)


@plugin
class Features(Analysis):
    """Feature maps of clean and patched images at every precision (paper, Figure 3).

    For each layer: how strongly the map changes at the patch and away from it, as a share of the size of the clean map;
    and the cosine of the change with the change at the highest precision, where patches are made as well.
    """

    patches: PatchFiles = ()
    attack: CraftingAttack = Lavan()
    targets: TargetClasses = (0,)
    layers: Annotated[
        tuple[str, ...], Field(description="layers whose output is looked at; none: the first three convolutions")
    ] = ()
    images: Annotated[int, Field(ge=1, description="at most so many test images, class-balanced")] = 64

    def run(self, context: AnalysisContext) -> Findings:
        """Measure the changes of feature maps, and draw features-MODEL.png for each model."""
        # Missing layers are reported before patches are made.
        layers = {m.name: choose_layers(m.model, self.layers, of=f"model {m.name}") for m in context.models}
        split = context.data.test.limited(self.images, seed=context.seed)
        images, _ = split.batch(torch.arange(len(split)), device=context.device)
        records: list[Record] = []
        pictures: list[Picture] = []
        for number, loaded in enumerate(context.models):
            context.progress(number, len(context.models), loaded.name)
            patches = reference_patches(context, loaded, [self.attack], finished=self.patches, targets=self.targets)
            patched, covered = apply_in_turn(patches, images, seed=context.seed)
            found, maps = _measure(context, loaded, layers[loaded.name], images, patched, covered)
            records += found
            pictures.append(_draw(context, loaded, maps))
        tables = [
            precision_table(f"Features: {what}", records, what, write=decimals(3), facets=("layer",), notes=(_NOTE,))
            for what in (_AT_PATCH, _ELSEWHERE, _COSINE)
        ]
        return Findings(
            title="Feature maps with and without a patch", records=records, tables=tables, pictures=pictures
        )


def covered_cells(covered: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the cells of a feature map that a patch touches, boolean (N, 1, h, w).

    Args:
        covered: boolean (N, 1, H, W), the pixels that the patch covers.
        size: (h, w) of the map, at most (H, W).
    """
    return F.adaptive_max_pool2d(covered.float(), size) > 0


def relative_change(change: Tensor, clean: Tensor, region: Tensor) -> Tensor:
    """Return the mean size of the change in a region, as a share of the clean map's mean size, (N,).

    Args:
        change: (N, C, h, w), patched minus clean.
        clean: (N, C, h, w).
        region: boolean (N, 1, h, w); the result is NaN for images whose region is empty.
    """
    inside = (change.abs().mean(dim=1, keepdim=True) * region).flatten(1).sum(dim=1) / region.flatten(1).sum(dim=1)
    size = clean.abs().flatten(1).mean(dim=1)
    return torch.where(size > 0, inside / size, torch.nan)


@dataclass(frozen=True)
class _FeatureMaps:
    """The outputs of the layers at one precision, by layer, for clean and for patched images."""

    clean: dict[str, Tensor]
    patched: dict[str, Tensor]

    def first(self) -> _FeatureMaps:
        """Return the maps of the first image."""
        return _FeatureMaps(
            {name: output[:1] for name, output in self.clean.items()},
            {name: output[:1] for name, output in self.patched.items()},
        )


_Measured: TypeAlias = tuple[Precision, str, str]
"""Precision, layer and quantity."""


def _measure(
    context: AnalysisContext,
    loaded: LoadedModel,
    layers: Mapping[str, nn.Module],
    images: Tensor,
    patched: Tensor,
    covered: Tensor,
) -> tuple[list[Record], dict[Precision, _FeatureMaps]]:
    """Return every number, and the maps of the first image at each precision."""
    values: dict[_Measured, list[Tensor]] = {}
    first: dict[Precision, _FeatureMaps] = {}
    # In batches, because the maps of all images and precisions together may be larger than the memory.
    for batch in torch.arange(len(images), device=images.device).split(context.batch_size):
        maps = {
            precision: _feature_maps(loaded, precision, layers, images[batch], patched[batch])
            for precision in context.precisions(loaded)
        }
        first = first or {precision: found.first() for precision, found in maps.items()}
        for key, found in _compare(maps, covered[batch]):
            values.setdefault(key, []).append(found)
    return [_record(loaded.name, *key, torch.cat(found)) for key, found in values.items()], first


def _feature_maps(
    loaded: LoadedModel, precision: Precision, layers: Mapping[str, nn.Module], images: Tensor, patched: Tensor
) -> _FeatureMaps:
    with torch.no_grad(), at_precision(loaded.model, precision), recorded_outputs(layers) as outputs:
        loaded.model(images)
        clean = dict(outputs)
        loaded.model(patched)
        return _FeatureMaps(clean, dict(outputs))


def _compare(maps: Mapping[Precision, _FeatureMaps], covered: Tensor) -> Iterator[tuple[_Measured, Tensor]]:
    """Yield the numbers of every image by precision, layer and quantity."""
    reference = next(iter(maps.values()))
    for precision, found in maps.items():
        for layer, clean in found.clean.items():
            change = found.patched[layer] - clean
            reference_change = reference.patched[layer] - reference.clean[layer]
            region = covered_cells(covered, (clean.shape[-2], clean.shape[-1]))
            yield (precision, layer, _AT_PATCH), relative_change(change, clean, region)
            yield (precision, layer, _ELSEWHERE), relative_change(change, clean, ~region)
            yield (precision, layer, _COSINE), cosines(change, reference_change, torch.ones_like(region))


def _record(model: str, precision: Precision, layer: str, what: str, values: Tensor) -> Record:
    # A map that the patch covers completely has nothing away from the patch.
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


def _draw(context: AnalysisContext, loaded: LoadedModel, maps: Mapping[Precision, _FeatureMaps]) -> Picture:
    """Draw the maps of the first image; all precisions of a layer share one scale, so they compare by eye."""
    layers = list(next(iter(maps.values())).clean)
    file = f"features-{loaded.name.replace('/', '-')}.png"
    sheet = ImageGrid(
        title=f"{loaded.name}: feature maps of one image",
        columns=tuple(f"{precision} bit" for precision in maps),
        rows=tuple(row for layer in layers for row in _rows(layer, list(maps.values()))),
        note="Mean size over channels; the brightest color is the largest value of the layer.",
    )
    draw_sheet(sheet, context.output / file)
    caption = f"Feature maps of the first image in {loaded.name}, clean and patched, at each precision."
    return Picture(file=file, caption=caption)


def _rows(layer: str, maps: Sequence[_FeatureMaps]) -> Iterator[tuple[str, tuple[Tile, ...]]]:
    sizes = {
        "clean": [_channel_mean(found.clean[layer]) for found in maps],
        "patched": [_channel_mean(found.patched[layer]) for found in maps],
    }
    largest = max(float(size.max()) for row in sizes.values() for size in row)
    for kind, row in sizes.items():
        yield f"{layer}\n{kind}", tuple(Tile(heat_map(size, largest=largest)) for size in row)


def _channel_mean(output: Tensor) -> Tensor:
    """Return the mean size over channels of the first image, (h, w)."""
    return output[0].abs().mean(dim=0)
