"""Procedural colored shapes on noise, of any image size and number, without files."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Generator, Tensor

from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.base import Dataset
from qadtr_brevitas.data.split import Split, check_split

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond", "bar", "column", "saltire", "frame")
# Images drawn at once, which bounds the memory that large ones need.
CHUNK = 256


@plugin
class Shapes(Dataset):
    """One colored shape on each image, at a random place and size on a background of noise; classes are the shapes."""

    image_size: Annotated[int, Field(ge=8, le=1024, description="height and width in pixels")] = 32
    classes: Annotated[int, Field(ge=2, le=len(SHAPES), description="number of shapes")] = len(SHAPES)
    train_images: Annotated[int, Field(ge=1, description="images for training")] = 1000
    test_images: Annotated[int, Field(ge=1, description="images for testing")] = 200
    seed: Annotated[int, Field(ge=0, description="decides every image")] = 0

    def load(self, split: str, *, limit: int | None = None, seed: int = 0, progress: Progress | None = None) -> Split:
        """Draw one split, uint8 (N, 3, image_size, image_size); classes take turns.

        Args:
            split: "train" or "test".
            limit: at most this many images, drawn by class as `Split.balanced` does; None for all.
            seed: seed of their choice.
            progress: called with the images drawn and the images in all.

        Raises:
            UsageError: the split has another name.
        """
        check_split(split)
        count = self.train_images if split == "train" else self.test_images
        labels = torch.arange(count) % self.classes
        images = torch.empty(count, 3, self.image_size, self.image_size, dtype=torch.uint8)
        for start in range(0, count, CHUNK):
            chunk = slice(start, start + CHUNK)
            images[chunk] = _draw(labels[chunk], self.image_size, generator(self.seed, "shapes", split, start))
            if progress:
                progress(min(start + CHUNK, count), count)
        return Split(images, labels, SHAPES[: self.classes]).limited(limit, seed=seed)


def _draw(labels: Tensor, size: int, generator: Generator) -> Tensor:
    """Draw the shapes `labels` (N,), uint8 (N, 3, size, size)."""
    count = len(labels)
    radius = torch.empty(count, 1, 1).uniform_(0.25, 0.4, generator=generator)
    center = radius + (1 - 2 * radius) * torch.rand(2, count, 1, 1, generator=generator)
    pixels = (torch.arange(size) + 0.5) / size
    y = (pixels[:, None] - center[0]) / radius
    x = (pixels[None, :] - center[1]) / radius
    inside = torch.stack(_shapes(x, y))[labels, torch.arange(count)]
    noise = torch.rand(count, 3, size, size, generator=generator)
    shades = torch.rand(2, count, 3, 1, 1, generator=generator)
    # The background stays in the lower half of the range and the shape in the upper one, so every shape can be seen.
    background, foreground = 0.25 * (shades[0] + noise), 0.6 + 0.4 * shades[1]
    return torch.where(inside[:, None], foreground, background).mul(255).round().to(torch.uint8)


def _shapes(x: Tensor, y: Tensor) -> list[Tensor]:
    """Return every shape of SHAPES in order, bool (N, H, W), of x and y (N, H or 1, W or 1); shapes fill [-1, 1]."""
    ax, ay = x.abs(), y.abs()
    box, distance = ax.maximum(ay), (x.square() + y.square()).sqrt()
    return [
        distance <= 1,
        box <= 0.85,
        (ay <= 1) & (ax <= (y + 1) / 2),
        (box <= 1) & (ax.minimum(ay) <= 0.3),
        (distance <= 1) & (distance >= 0.6),
        ax + ay <= 1,
        (ax <= 1) & (ay <= 0.35),
        (ay <= 1) & (ax <= 0.35),
        (box <= 1) & ((ax - ay).abs() <= 0.35),
        (box <= 0.9) & (box >= 0.55),
    ]
