"""Random changes to each training picture, those of timm; what is random comes from a seed for each picture."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import numpy
import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomCrop, RandomHorizontalFlip

from qadtr_brevitas.core.errors import UsageError

Interpolation: TypeAlias = Literal["bilinear", "bicubic", "random"]
EraseMode: TypeAlias = Literal["const", "rand", "pixel"]


@dataclass(frozen=True, kw_only=True)
class TrainingTransform:
    """Changes one picture at random, in the order of timm: crop, mirror, RandAugment, color jitter, erase.

    Args:
        size: height and width of the result, in pixels.
        scale: least and greatest share of the area that a random crop keeps before it is resized; None for no such
            crop, of pictures that have the size already.
        ratio: least and greatest ratio of width to height of the crop.
        interpolation: how the crop is resized.
        pad: crop at random after so many black pixels were added on each side.
        flip: probability of a mirror image.
        rand_augment: timm's description of a RandAugment, as `rand-m9-mstd0.5-inc1`; None for none.
        color_jitter: strength of random brightness, contrast and saturation; on top of a RandAugment too.
        erase: probability that a rectangle is erased (Zhong et al. 2020).
        erase_mode: what fills it: the mean color of ImageNet, a random color, or random pixels.

    Raises:
        UsageError: timm does not know the RandAugment.
    """

    size: tuple[int, int]
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    pad: int = 0
    flip: float = 0.5
    rand_augment: str | None = None
    color_jitter: float = 0.0
    erase: float = 0.0
    erase_mode: EraseMode = "pixel"

    def __post_init__(self) -> None:
        object.__setattr__(self, "_steps", list(self._make_steps()))
        eraser = RandomErasing(self.erase, mode=self.erase_mode, device="cpu") if self.erase else None
        object.__setattr__(self, "_eraser", eraser)
        self._steps: list[Callable[[Image.Image], Image.Image]]
        self._eraser: RandomErasing | None

    def __call__(self, picture: Image.Image, *, seed: int) -> Tensor:
        """Return a changed picture, uint8 (C, H, W); the same seed changes it the same way.

        Call it inside `own_random_streams`.

        Raises:
            UsageError: the picture has another size, and none of the changes makes it fit.
        """
        _seed_streams(seed)
        for step in self._steps:
            picture = step(picture)
        pixels = torch.from_numpy(numpy.array(picture))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        if tuple(pixels.shape[1:]) != self.size:
            raise UsageError(
                f"a training image is {pixels.shape[1]}x{pixels.shape[2]} and not {self.size[0]}x{self.size[1]}: give "
                "data.transform.scale"
            )
        return self._erased(pixels).contiguous()

    def _make_steps(self) -> Generator[Callable[[Image.Image], Image.Image]]:
        if self.scale is not None:
            crop = RandomResizedCropAndInterpolation(self.size, self.scale, self.ratio, self.interpolation)
            yield cast("Callable[[Image.Image], Image.Image]", crop)
        if self.pad:
            yield RandomCrop(self.size, padding=self.pad)
        if self.flip:
            yield RandomHorizontalFlip(self.flip)
        if self.rand_augment is not None:
            yield self._rand_augment(self.rand_augment)
        if self.color_jitter:
            yield ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter)

    def _rand_augment(self, description: str) -> Callable[[Image.Image], Image.Image]:
        settings: dict[str, Any] = {
            "translate_const": int(min(self.size) * 0.45),
            "img_mean": tuple(min(255, round(255 * mean)) for mean in IMAGENET_DEFAULT_MEAN),
        }
        if self.interpolation != "random":
            settings["interpolation"] = str_to_pil_interp(self.interpolation)
        try:
            augment = rand_augment_transform(description, settings)
        except (AssertionError, KeyError, ValueError) as error:
            raise UsageError(
                f"timm has no RandAugment {description!r}: give data.transform.rand_augment=rand-m9-mstd0.5-inc1, for "
                "instance"
            ) from error
        for operation in augment.ops:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterized
        return augment

    def _erased(self, pixels: Tensor) -> Tensor:
        if self._eraser is None:
            return pixels
        # The colors that timm fills in are normalized; what it leaves alone stays as it is.
        canvas = self._eraser(torch.full(pixels.shape, torch.nan))
        mean, std = (torch.tensor(c)[: len(pixels), None, None] for c in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        filled = (canvas * std + mean).clamp(0, 1).mul(255).round()
        return torch.where(canvas.isnan(), pixels, filled.nan_to_num().to(torch.uint8))


def _posterized(picture: Image.Image, bits_to_keep: int, **settings: Any) -> Image.Image:
    """Keep the upper bits of each value; none of them at the greatest strength, which newer Pillows refuse."""
    if bits_to_keep < 1:
        return Image.new(picture.mode, picture.size)
    return posterize(picture, bits_to_keep, **settings)


@contextmanager
def own_random_streams() -> Generator[None]:
    """Give Python's, NumPy's and PyTorch's global random streams back afterwards as they were before."""
    python, arrays, tensors = random.getstate(), numpy.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        torch.default_generator.set_state(tensors)


def _seed_streams(seed: int) -> None:
    # Transforms of timm and torchvision draw from all three.
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)
    # Not torch.manual_seed, which seeds devices as well.
    torch.default_generator.manual_seed(seed)
