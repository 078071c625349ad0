"""Feature maps with and without a patch: does what a patch does inside a network survive fewer bits?

What layers put out, by their names.

Runs clean and patched images through a network at every precision and compares what its layers put out.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qadtr_brevitas.config.slots import Slot
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.registry import ATTACKS
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.report.plots import ImageGrid, Tile, draw_sheet
from qadtr_brevitas.quant import SwitchableModel, at_precision
from qadtr_brevitas.reproduce.analyses.base import Analysis, AnalysisContext, Findings, Picture, Record
from qadtr_brevitas.reproduce.analyses.charts import by_precision, decimals, heat
from qadtr_brevitas.reproduce.analyses.gradients import Average, cosines
from qadtr_brevitas.reproduce.analyses.patches import float_patches, put_on


@plugin
class Features(Analysis):
    """Feature maps of clean and patched images at every precision (paper, Figure 3).

    For each layer: how strongly the map changes at the patch and away from it, as a share of the clean map's size, and
    how far the change points where it does at the highest precision (cosine), which is also where patches are made.
    """

    patches: Annotated[
        tuple[str, ...], Field(description="finished patches, files or folders; none: make them with attack")
    ] = ()
    attack: Annotated[Any, Slot(ATTACKS), Field(description="patch attack, used where no patches are given")] = "lavan"
    targets: Annotated[
        tuple[int, ...] | None, Field(description="classes that patches are made for; null: the first three")
    ] = (0,)
    layers: Annotated[
        tuple[str, ...], Field(description="layers whose output is looked at; none: the first three convolutions")
    ] = ()
    images: Annotated[int, Field(ge=1, description="at most so many test images, class-balanced")] = 64

    def run(self, context: AnalysisContext) -> Findings:
        """Measures, and draws features-MODEL.png for each model."""
        return run(self, context)


_FIRST = 3
_SHOWN = 12
_INSIDE = ("brevitas.", "qadtr_brevitas.quant.")


def choose_layers(model: nn.Module, names: Sequence[str], *, of: str) -> dict[str, nn.Module]:
    """Layers of a switchable model by name; its first three convolutions where no names are given.

    Args:
        model: a switchable model.
        names: as in the float network.
        of: name of the model, for errors.

    Raises:
        UsageError: there is no layer of a name (the nearest ones are offered), or no convolution to choose.
    """
    modules = _layers(model.net if isinstance(model, SwitchableModel) else model)
    if not names:
        found = {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)}
        if not found:
            raise UsageError(f"{of} has no convolutions: choose layers=[...] from {_some(modules)}")
        return dict(list(found.items())[:_FIRST])
    for name in names:
        if name not in modules:
            near = get_close_matches(name, modules, n=1)
            raise UsageError(
                f"{of} has no layer {name!r}: "
                + (f"did you mean {near[0]!r}?" if near else f"choose from {_some(modules)}")
            )
    return {name: modules[name] for name in names}


def _layers(net: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The layers of a network by name; what is inside of quantizers and norms is none of them."""
    found: dict[str, nn.Module] = {}
    for name, child in net.named_children():
        found[prefix + name] = child
        if not type(child).__module__.startswith(_INSIDE) or any(
            isinstance(part, (nn.Conv2d, nn.Linear)) for part in child.modules() if part is not child
        ):
            found |= _layers(child, f"{prefix}{name}.")
    return found


def _some(names: Iterable[str]) -> str:
    """The first names, because networks have hundreds."""
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


@contextmanager
def recorded(layers: dict[str, nn.Module]) -> Generator[dict[str, Tensor]]:
    """A block in which the latest output of each layer is in the dictionary.

    Raises:
        UsageError: a layer's output is no feature map (N, C, h, w).
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UsageError(
                f"layer {name!r} puts out {shape}, not a map (N, C, h, w): choose another one, such as a convolution"
            )
        found[name] = output.detach()

    handles = [
        layer.register_forward_hook(lambda module, inputs, output, name=name: keep(name, output))
        for name, layer in layers.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def covered_cells(covered: Tensor, size: tuple[int, int]) -> Tensor:
    """Which cells of a map a patch touches, boolean (N, 1, h, w).

    Args:
        covered: boolean (N, 1, H, W), pixels of the images.
        size: (h, w) of the map, at most (H, W).
    """
    return F.adaptive_max_pool2d(covered.float(), size) > 0


def change_at(change: Tensor, clean: Tensor, region: Tensor) -> Tensor:
    """Mean size of the change in a region as a share of the clean map's mean size, (N,).

    Args:
        change: (N, C, h, w), patched minus clean.
        clean: (N, C, h, w).
        region: boolean (N, 1, h, w); NaN where it is empty.
    """
    inside = (change.abs().mean(dim=1, keepdim=True) * region).flatten(1).sum(dim=1) / region.flatten(1).sum(dim=1)
    size = clean.abs().flatten(1).mean(dim=1)
    return torch.where(size > 0, inside / size, torch.nan)


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


def run(analysis: Features, context: AnalysisContext) -> Findings:
    """As `Features.run` says."""
    # A layer that is not there is told before patches are made.
    chosen = {s.name: choose_layers(s.model, analysis.layers, of=f"model {s.name}") for s in context.loaded_models}
    split = context.data.test.limited(analysis.images, seed=context.seed)
    images, _ = split.batch(torch.arange(len(split)), device=context.device)
    records: list[Record] = []
    pictures: list[Picture] = []
    for number, loaded in enumerate(context.loaded_models):
        context.progress(number, len(context.loaded_models), loaded.name)
        patches = float_patches(context, loaded, [analysis.attack], finished=analysis.patches, targets=analysis.targets)
        found, maps = _measure(
            context, loaded, chosen[loaded.name], *put_on(patches, images, seed=context.seed), images
        )
        records += found
        pictures.append(_draw(context, loaded, maps))
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
    context: AnalysisContext,
    loaded: LoadedModel,
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
        maps = {p: _maps(loaded, p, layers, images[part], patched[part]) for p in context.precisions(loaded)}
        drawn = drawn or {precision: found.first() for precision, found in maps.items()}
        for where, found in _compare(maps, covered[part]):
            values.setdefault(where, []).append(found)
    records = [_record(loaded.name, *where, torch.cat(found)) for where, found in values.items()]
    return records, drawn


def _maps(
    loaded: LoadedModel, precision: Precision, layers: dict[str, nn.Module], images: Tensor, patched: Tensor
) -> _Maps:
    with torch.no_grad(), at_precision(loaded.model, precision), recorded(layers) as outputs:
        loaded.model(images)
        clean = dict(outputs)
        loaded.model(patched)
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


def _draw(context: AnalysisContext, loaded: LoadedModel, maps: dict[Precision, _Maps]) -> Picture:
    """The first image's maps; every layer has one scale, so that precisions can be compared by eye."""
    layers = list(next(iter(maps.values())).clean)
    rows = [row for layer in layers for row in _rows(layer, list(maps.values()))]
    file = f"features-{loaded.name.replace('/', '-')}.png"
    sheet = ImageGrid(
        title=f"{loaded.name}: feature maps of one image",
        columns=tuple(f"{precision} bit" for precision in maps),
        rows=tuple(rows),
        note="Mean size over channels; the brightest color is the largest value of the layer.",
    )
    draw_sheet(sheet, context.output / file)
    return Picture(file, f"Feature maps of the first image in {loaded.name}, clean and patched, at each precision.")


def _rows(layer: str, maps: Sequence[_Maps]) -> Iterator[tuple[str, tuple[Tile, ...]]]:
    sizes = {
        kind: [getattr(found, kind)[layer][0].abs().mean(dim=0) for found in maps] for kind in ("clean", "patched")
    }
    most = max(float(size.max()) for found in sizes.values() for size in found)
    for kind, found in sizes.items():
        yield f"{layer}\n{kind}", tuple(Tile(heat(size, most=most)) for size in found)
