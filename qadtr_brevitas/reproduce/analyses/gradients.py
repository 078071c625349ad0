"""Input gradients at each precision against those at the highest: whether attacks at both follow the same direction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qadtr_brevitas.attacks.drawing import as_rgb
from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.attacks.pixel import Pgd
from qadtr_brevitas.config.slots import Slot
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.registry import ATTACKS
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.image_attacks import NamedAttack, SourcedAttack
from qadtr_brevitas.evaluation.report.plots import ImageGrid, Tile, draw_sheet
from qadtr_brevitas.quant.inference import logits_at, parse_mode
from qadtr_brevitas.reproduce.analyses.base import (
    Analysis,
    AnalysisContext,
    CraftingAttack,
    Findings,
    PatchFiles,
    TargetClasses,
)
from qadtr_brevitas.reproduce.analyses.charts import Curve, Point, draw_curves, heat_map
from qadtr_brevitas.reproduce.analyses.document import Picture, Record
from qadtr_brevitas.reproduce.analyses.patches import apply_in_turn, reference_patches
from qadtr_brevitas.reproduce.analyses.similarity import Average, cosines, squared_errors
from qadtr_brevitas.reproduce.analyses.tables import decimals, precision_table

if TYPE_CHECKING:
    from qadtr_brevitas.attacks.base import ImageAttack

    ImageAttackSlot: TypeAlias = ImageAttack
else:
    ImageAttackSlot = Annotated[
        Any,
        Slot(
            ATTACKS,
            contract="qadtr_brevitas.attacks.base:ImageAttack",
            advice="it does not attack single images: choose another one, for instance pixel=pgd",
        ),
    ]

_PATCH, _IMAGE, _ZEROS = "patch", "image", "zeros around the patch"
_COSINE, _MSE, _RELATIVE = "cosine", "mse", "relative mse"
_NOTE = (
    "Gradient of the cross-entropy with the true class, on images attacked at {reference} bit, against the gradient at "
    "{reference} bit on the same images. Cosine and mse: means over images, the mse of values of gradients of single "
    "images. Relative mse: squared errors of all images as a share of the squared gradients at {reference} bit."
)

_GradientRow: TypeAlias = tuple[str, tuple[Tile | None, ...]]


@plugin
class Gradients(Analysis):
    """Cosine and mean squared error of input gradients between precisions (paper, Figure 4).

    Adversarial images are made at the highest precision, 32 bit if the model has it: with universal patches, and with a
    pixel attack. On these images the gradient of the cross-entropy with the true class, which both attacks increase, is
    computed at every precision and compared with the gradient at the highest: on the pixels of the patch, on the whole
    image, and, for patches, on the whole image with zeros around the patch. The last is all that an attacker with a
    patch uses, but its mean error is small only because it counts pixels without any error.
    """

    patches: PatchFiles = ()
    attack: CraftingAttack = Lavan()
    targets: TargetClasses = (0,)
    pixel: Annotated[ImageAttackSlot, Field(description="attack on every pixel")] = Pgd()
    images: Annotated[int, Field(ge=1, description="at most so many test images, class-balanced")] = 200

    def run(self, context: AnalysisContext) -> Findings:
        """Compare the gradients, and draw gradients.png and cosine.png."""
        split = context.data.test.limited(self.images, seed=context.seed)
        images, labels = split.batch(torch.arange(len(split)), device=context.device)
        records: list[Record] = []
        rows: list[_GradientRow] = []
        for number, loaded in enumerate(context.models):
            precisions = context.precisions(loaded)
            for part, attacked in enumerate(self._attacked_images(context, loaded, images, labels)):
                context.progress(number * 2 + part, len(context.models) * 2, loaded.name)
                gradients = {
                    p: input_gradients(loaded.model, p, attacked.images, labels, batch_size=context.batch_size)
                    for p in precisions
                }
                records += _records(loaded.name, attacked, gradients)
                rows.append(_gradient_row(loaded.name, attacked, gradients))
        columns = max((context.precisions(loaded) for loaded in context.models), key=len)
        note = _NOTE.format(reference=columns[0])
        tables = [
            precision_table(
                f"Gradients: {what}", records, what, write=decimals(4), facets=("attack", "region"), notes=(note,)
            )
            for what in (_COSINE, _MSE, _RELATIVE)
        ]
        pictures = [_draw_maps(context, rows, columns), _draw_cosines(context, records, columns[1:])]
        return Findings(
            title=f"Gradients at each precision against those at {columns[0]} bit",
            records=records,
            tables=tables,
            pictures=pictures,
        )

    def _attacked_images(
        self, context: AnalysisContext, loaded: LoadedModel, images: Tensor, labels: Tensor
    ) -> Iterator[_AttackedImages]:
        """Yield the images with patches, then those of the pixel attack, both made at the highest precision."""
        patches = reference_patches(context, loaded, [self.attack], finished=self.patches, targets=self.targets)
        patched, covered = apply_in_turn(patches, images, seed=context.seed)
        whole = torch.ones_like(covered)
        name = ", ".join(dict.fromkeys(patch.facts.family for patch in patches))
        yield _AttackedImages(name, "patch", patched, {_PATCH: covered, _IMAGE: whole, _ZEROS: covered})
        pixel = NamedAttack.of(self.pixel)
        source = SourcedAttack(pixel, loaded, parse_mode(context.precisions(loaded)[0]))
        made = [
            source.images(images[part], labels[part], seed=context.seed, chunk=range(int(part[0]), int(part[-1]) + 1))
            for part in torch.arange(len(images)).split(context.batch_size)
        ]
        yield _AttackedImages(pixel.family, "pixel", torch.cat(made), {_PATCH: covered, _IMAGE: whole})


@dataclass(frozen=True)
class _AttackedImages:
    """Attacked images, and the pixels that gradients are compared on.

    Args:
        attack: the attack and its settings.
        kind: `patch` or `pixel`.
        images: (N, 3, H, W) in [0, 1].
        regions: boolean (N, 1, H, W) by name.
    """

    attack: str
    kind: str
    images: Tensor
    regions: Mapping[str, Tensor]


def input_gradients(
    model: nn.Module, precision: Precision, images: Tensor, labels: Tensor, *, batch_size: int
) -> Tensor:
    """Return the gradient of each image's cross-entropy with its label, (N, 3, H, W).

    Args:
        model: a switchable model in evaluation mode and `frozen_weights`.
        precision: the precision that the model runs at.
        images: (N, 3, H, W) in [0, 1].
        labels: (N,).
        batch_size: images in one pass.
    """
    logits = logits_at(model, parse_mode(precision))
    gradients: list[Tensor] = []
    for batch, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        inputs = batch.detach().clone().requires_grad_(True)
        # A mean would make each image's gradient depend on the number of images.
        loss = F.cross_entropy(logits(inputs), truth, reduction="sum")
        gradients += torch.autograd.grad(loss, inputs)
    return torch.cat(gradients)


def _records(model: str, attacked: _AttackedImages, gradients: Mapping[Precision, Tensor]) -> Iterator[Record]:
    """Yield the numbers of every precision but the first, which is the reference."""
    reference, *others = gradients
    for precision in others:
        for region, pixels in attacked.regions.items():
            errors, relative = squared_errors(gradients[precision], gradients[reference], pixels)
            if region == _ZEROS:
                # The same errors, as a mean over all pixels of the image.
                errors = errors * pixels.flatten(1).cpu().double().mean(dim=1)
            measured = {
                _COSINE: Average.of(cosines(gradients[precision], gradients[reference], pixels)),
                _MSE: Average.of(errors),
                _RELATIVE: Average(relative, None, None, len(errors)),
            }
            for what, average in measured.items():
                yield Record(
                    model=model,
                    precision=str(precision),
                    what=what,
                    value=average.value,
                    low=average.low,
                    high=average.high,
                    n=average.n,
                    facets={"attack": attacked.attack, "kind": attacked.kind, "region": region},
                )


def _gradient_row(model: str, attacked: _AttackedImages, gradients: Mapping[Precision, Tensor]) -> _GradientRow:
    """Return the first image and the sizes of its gradients."""
    tiles = [Tile(heat_map(gradient[0].abs().sum(dim=0))) for gradient in gradients.values()]
    return f"{model}\n{attacked.attack}", (Tile(as_rgb(attacked.images[0].cpu())), *tiles)


def _draw_maps(context: AnalysisContext, rows: Sequence[_GradientRow], columns: Sequence[Precision]) -> Picture:
    width = len(columns) + 1
    sheet = ImageGrid(
        title="Size of the gradient at each pixel",
        columns=("image", *(f"{precision} bit" for precision in columns)),
        rows=tuple((label, (*tiles, *[None] * (width - len(tiles)))) for label, tiles in rows),
        note="Each map is scaled to its own largest value.",
    )
    draw_sheet(sheet, context.output / "gradients.png")
    caption = "Size of the gradient at each pixel of the first image, at each precision."
    return Picture(file="gradients.png", caption=caption)


def _draw_cosines(context: AnalysisContext, records: Sequence[Record], precisions: Sequence[Precision]) -> Picture:
    places = [str(precision) for precision in precisions]
    curves: dict[str, list[Point | None]] = {}
    for record in records:
        if record.what == _COSINE and record.facets["region"] != _ZEROS:
            label = f"{record.model}: {record.facets['attack']}, on the {record.facets['region']}"
            points = curves.setdefault(label, [None] * len(places))
            if record.value is not None:
                points[places.index(record.precision)] = Point(record.value, record.low, record.high)
    draw_curves(
        [Curve(label, points) for label, points in curves.items()],
        places,
        context.output / "cosine.png",
        x_label="precision (bit)",
        y_label="cosine with the highest precision",
    )
    caption = "Cosine of gradients with those at the highest precision, with 95 % intervals."
    return Picture(file="cosine.png", caption=caption)
