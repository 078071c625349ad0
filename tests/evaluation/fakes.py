"""A model whose answers are known, images it reads its answers from, and patches it knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from qadtr_brevitas.attacks.base import ImageAttack, TargetedAttack
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.precision import Precision, parse_precisions
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation import Grid, evaluate
from qadtr_brevitas.evaluation.entries import LoadedModel, NamedPatch
from qadtr_brevitas.evaluation.report import EvaluationReport
from qadtr_brevitas.quant.model_info import ModelInfo
from qadtr_brevitas.quant.switch import Switch

SIDE, CLASSES = 8, 4
_STEP = 10


def coded_split(images: int = 40, *, side: int = SIDE) -> Split:
    """Dark images of one gray level, which is the class times ten."""
    labels = torch.arange(images) % CLASSES
    pixels = (labels * _STEP).to(torch.uint8)[:, None, None, None].expand(images, 3, side, side).contiguous()
    return Split(pixels, labels, tuple("abcd"))


class Reader(nn.Module):
    """Reads the class off the image; sees `target` where it finds a white patch at a precision that is fooled."""

    def __init__(self, *, target: int = 2, fooled_at: Sequence[int] = (8, 4), always: int | None = None) -> None:
        super().__init__()
        self.switch = Switch(parse_precisions((8, 4)))
        self.target, self.fooled_at, self.always = target, parse_precisions(fooled_at), always
        self.forwards = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += 1
        classes = (images.flatten(1).median(dim=1).values * 255 / _STEP).round().long()
        white = (images == 1).flatten(1).sum(dim=1) >= 12
        if self.switch.precision in self.fooled_at:
            classes = torch.where(white, self.target, classes)
        if self.always is not None:
            classes = torch.full_like(classes, self.always)
        return one_hot(classes, CLASSES).float()


def reader(name: str = "reader", model: Reader | None = None, *, fingerprint: str | None = None) -> LoadedModel:
    """A subject around a Reader."""
    info = ModelInfo(
        name="toy",
        args={},
        num_classes=CLASSES,
        image_size=(SIDE, SIDE),
        classes=tuple("abcd"),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        quant={"first_last": "8bit"},
        source="a recipe",
    )
    return LoadedModel(name, model or Reader(), fingerprint or f"{name}-weights", info, path=f"runs/{name}")


def white_patch(
    name: str = "white",
    *,
    side: int = 2,
    target: int | None = 2,
    model: str = "reader",
    precision: int = 4,
    place: tuple[int, int] | None = None,
) -> NamedPatch:
    """A white patch, said to be made on a subject of that name at that precision."""
    meta = {
        "attack": "lavan",
        "settings": {"steps": 3},
        "target": target,
        "model": model,
        "fingerprint": f"{model}-weights",
        "precision": str(Precision(precision, precision)),
    }
    mask = torch.ones(side, side, dtype=torch.bool)
    return NamedPatch(name, Patch(texture=torch.ones(3, side, side), mask=mask, place=place or "random", meta=meta))


def make_grid(
    loaded_models: Sequence[LoadedModel],
    patches: Sequence[NamedPatch] = (),
    split: Split | None = None,
    **settings: Any,
) -> Grid:
    """A grid on the coded images."""
    return Grid(
        loaded_models=loaded_models, patches=patches, split=split or coded_split(), data_name="coded", **settings
    )


def small_report(
    tmp_path: Path, *, models: Sequence[str] = ("reader",), targets: Sequence[int | None] = (2,)
) -> EvaluationReport:
    """The report of a white-box patch at each precision, for each model and target."""
    loaded_models = [reader(name, Reader(fooled_at=(8, 4) if name == "reader" else (4,))) for name in models]
    patches = [
        white_patch(f"{name}-{bits}-{target}", model=name, precision=bits, target=target)
        for name in models
        for bits in (8, 4)
        for target in targets
    ]
    return evaluate(make_grid(loaded_models, patches), output=tmp_path, command="qadtr-brevitas evaluate x")


@dataclass(frozen=True)
class Whiten(ImageAttack, TargetedAttack):
    """A per-image attack that whitens a corner where that fools the model it is given; it notes its calls."""

    target: int | None = None
    side: int = 2
    calls: ClassVar[list[str]] = []

    def run(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
    ) -> Tensor:
        self.calls.append(f"{precision} {len(images)}")
        white = images.clone()
        white[:, :, : self.side, : self.side] = 1
        fooled = model(white).argmax(1) != labels
        return torch.where(fooled[:, None, None, None], white, images)
