"""What a model sees: its prediction on an image with a patch, how the masks vote, and the gradient of the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qadtr_brevitas.attacks.gradients import gradient_or_zero
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel, NamedPatch
from qadtr_brevitas.evaluation.mask_fill import MaskFill
from qadtr_brevitas.evaluation.masks import covering_set, mean_color
from qadtr_brevitas.evaluation.patch_cleanser import double_masking
from qadtr_brevitas.quant import at_precision, frozen_weights, precisions_or_all
from qadtr_brevitas.viewing.pictures import gradient_address, image_address, patch_address

_SHOWN = 3
# Where there is no patch, one of noise has this share of the shorter side.
_NOISE_SHARE = 4


@dataclass(frozen=True)
class Look:
    """What is asked for.

    Args:
        image: index of the image.
        precision: name of the precision.
        patch: index of the patch; None for the image without one.
        row: row of the upper left corner of the patch.
        column: column of the same.
        votes: whether the masks vote.
        prove: whether the defended prediction is to be proved too, which takes hundreds of forward passes.
        model: index of the model.
    """

    image: int
    precision: str
    patch: int | None = None
    row: int = 0
    column: int = 0
    votes: bool = False
    prove: bool = False
    model: int = 0

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Look:
        """Read what a page sent.

        Raises:
            UsageError: an unknown name, or a value of another type.
        """
        kinds = {"image": int, "precision": str, "patch": int, "row": int, "column": int}
        kinds |= {"votes": bool, "prove": bool, "model": int}
        if unknown := sorted(values.keys() - kinds.keys()):
            raise UsageError(f"unknown name {unknown[0]!r}: give {', '.join(kinds)}")
        for name, value in values.items():
            # A bool is an int in Python, but no index.
            if type(value) is not kinds[name] and not (name == "patch" and value is None):
                raise UsageError(f"{name} is {value!r}: give {kinds[name].__name__}")
        if missing := [name for name in ("image", "precision") if name not in values]:
            raise UsageError(f"{missing[0]} is missing: give the image and the precision")
        return cls(**values)


@dataclass(frozen=True)
class Scene:
    """A model with images and patches to look at; one look at a time.

    Args:
        loaded: a model in eval mode.
        split: images of its classes and size.
        patches: patches that fit on them; none for one of noise.
        device: where the model is.
        seed: decides about the noise.
    """

    loaded: LoadedModel
    split: Split
    patches: Sequence[NamedPatch] = ()
    device: torch.device | str = "cpu"
    seed: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False)

    def __post_init__(self) -> None:
        found = list(self.patches) or [_noise(self.split, self.seed)]
        height, width = self.split.image_size
        for named in found:
            named.patch.check_channels(self.split.channels)
            if named.patch.size[0] > height or named.patch.size[1] > width:
                rows, columns = named.patch.size
                raise UsageError(
                    f"patch {named.name} of {rows}x{columns} pixels does not fit on images of {height}x{width}: "
                    "scale it with --patch-size"
                )
        object.__setattr__(self, "patches", found)

    def facts(self) -> dict[str, Any]:
        """Return what a page needs to know first: names, images and patches."""
        classes = self.split.classes
        images, labels = self.split.batch(torch.arange(len(self.split)))
        return {
            "model": self.loaded.name,
            "architecture": self.loaded.info.name,
            "size": list(self.split.image_size),
            "precisions": [str(precision) for precision in precisions_or_all(self.loaded.model, None)],
            "images": [
                {"picture": image_address(image), "label": classes[label]}
                for image, label in zip(images, labels.tolist(), strict=True)
            ],
            "patches": [
                {
                    "name": named.name,
                    "size": list(named.patch.size),
                    "picture": patch_address(named.patch.texture, named.patch.mask),
                    "target": None if (target := named.patch.meta.get("target")) is None else classes[target],
                }
                for named in self.patches
            ],
        }

    def look(self, asked: Look) -> dict[str, Any]:
        """Return the prediction, the gradient as a picture and, where asked for, the votes of the masks.

        Raises:
            UsageError: there is no such image, patch or precision, or the patch does not lie on the image.
        """
        model = self.loaded.model
        (precision,) = precisions_or_all(model, [asked.precision])
        images, labels = self._image(asked)
        with self._lock, at_precision(model, precision), frozen_weights(model):
            shown = images.clone().requires_grad_()
            logits = model(shown)
            gradient = gradient_or_zero(cross_entropy(logits, labels), shown)[0]
            found = {
                "label": self.split.classes[int(labels)],
                "top": self._top(logits[0]),
                "gradient": {"picture": gradient_address(gradient), "largest": _finite(gradient.abs().max())},
            }
            if asked.votes or asked.prove:
                found["votes"] = self._votes(images, asked)
        return found

    def end(self) -> None:
        """Wait for the look in progress, and begin no other: a process that ends amid one aborts."""
        self._lock.acquire()

    def _image(self, asked: Look) -> tuple[Tensor, Tensor]:
        if not 0 <= asked.image < len(self.split):
            raise UsageError(f"there is no image {asked.image}: give 0 to {len(self.split) - 1}")
        images, labels = self.split.batch(torch.tensor([asked.image]), device=self.device)
        if asked.patch is None:
            return images, labels
        patch = self._patch(asked).patch.to(self.device)
        corner = torch.tensor([[asked.row, asked.column]], device=self.device)
        return patch.apply(images, corners=corner), labels

    def _patch(self, asked: Look) -> NamedPatch:
        if asked.patch is None or not 0 <= asked.patch < len(self.patches):
            raise UsageError(f"there is no patch {asked.patch}: give 0 to {len(self.patches) - 1}")
        return self.patches[asked.patch]

    def _top(self, logits: Tensor) -> list[dict[str, Any]]:
        """Return the most likely classes with their probabilities."""
        probabilities = logits.detach().double().softmax(dim=0)
        best = probabilities.topk(min(_SHOWN, len(probabilities)))
        return [
            {"class": self.split.classes[index], "probability": _finite(value)}
            for value, index in zip(best.values, best.indices.tolist(), strict=True)
        ]

    def _votes(self, images: Tensor, asked: Look) -> dict[str, Any]:
        """Return what double masking sees under each single mask, and what it decides."""
        first = self.patches[0] if asked.patch is None else self._patch(asked)
        covering = covering_set(self.split.image_size, first.patch.size)
        masks, classes, seen = covering.masks, self.split.classes, list[Tensor]()

        def remembering(masked: Tensor) -> Tensor:
            seen.append(self.loaded.model(masked))
            return seen[-1]

        with torch.no_grad():
            fill = MaskFill(mean_color(self.loaded.info.mean))
            found = double_masking(remembering, images, masks, fill=fill, prove=asked.prove)
        # The first passes are those under each mask alone.
        alone = torch.cat(seen)[: len(masks)].softmax(dim=1)
        best = alone.max(dim=1)
        return {
            "columns": len(covering.columns),
            "patch": f"{covering.patch}",
            "masks": [
                {"box": _box(mask), "class": classes[index], "probability": _finite(value)}
                for mask, index, value in zip(masks, best.indices.tolist(), best.values, strict=True)
            ],
            "decision": classes[int(found.defended)],
            "proved": bool(found.proved >= 0) if asked.prove else None,
            "passes": None if found.passes is None else int(found.passes),
        }


def _noise(split: Split, seed: int) -> NamedPatch:
    side = max(1, min(split.image_size) // _NOISE_SHARE)
    draw = generator(seed, "view noise")
    texture = torch.randint(256, (split.channels, side, side), generator=draw) / 255
    return NamedPatch("noise", Patch(texture=texture, mask=torch.ones(side, side, dtype=torch.bool)))


def _box(mask: Tensor) -> list[int]:
    """Return row, column, height and width of a rectangular mask (H, W)."""
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    return [int(rows[0]), int(columns[0]), len(rows), len(columns)]


def _finite(value: Tensor) -> float | None:
    """Return a number that JSON has, or None."""
    return cast("float", value.item()) if bool(value.isfinite()) else None
