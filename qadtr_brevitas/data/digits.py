"""UCI handwritten digits, drawn as 32x32 color images: a real data set that needs no download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
doi:10.24432/C50P49, licensed CC BY 4.0 (see digits.LICENSE.txt beside the data); the 1,797 images that scikit-learn
also ships. The color, place and size of the drawing are ours.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated

import numpy
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.base import Dataset
from qadtr_brevitas.data.split import Split, check_split

IMAGE_SIZE = 32
DRAWN_SIZE = 24
INK_LEVELS = 16
TEST_IMAGES = 360
MIN_CONTRAST = 0.4


@plugin
class Digits(Dataset):
    """Handwritten digits in random colors at random places: 1,437 images for training and 360 for testing, 10 classes.

    Which image is in which split never changes; `seed` decides color and place only.
    """

    seed: Annotated[int, Field(ge=0, description="decides the color and place of each image")] = 0

    def load(self, split: str, *, limit: int | None = None, seed: int = 0, progress: Progress | None = None) -> Split:
        """Draw the images of one split, uint8 (N, 3, 32, 32).

        Args:
            split: "train" or "test".
            limit: at most this many images, drawn by class as `Split.balanced` does; None for all.
            seed: seed of their choice.
            progress: not called, because it takes no time.

        Raises:
            UsageError: the split has another name.
        """
        check_split(split)
        ink, labels = _read()
        images = _draw(ink, generator(self.seed, "digits"))
        everything = Split(images, labels, tuple(str(digit) for digit in range(10)))
        test, train = everything.divide(TEST_IMAGES, seed=0)
        return (train if split == "train" else test).limited(limit, seed=seed)


def _read() -> tuple[Tensor, Tensor]:
    """Return ink in [0, 1], float32 (1797, 8, 8), and labels, int64 (1797,)."""
    with files("qadtr_brevitas.data").joinpath("digits.npz").open("rb") as file:
        stored = numpy.load(file, allow_pickle=False)
        ink, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])
    return ink.float() / INK_LEVELS, labels.long()


def _draw(ink: Tensor, generator: Generator) -> Tensor:
    """Draw ink (N, 8, 8) larger, each at its own place and in its own two colors, uint8 (N, 3, 32, 32)."""
    count = len(ink)
    drawn = F.interpolate(ink[:, None], size=DRAWN_SIZE, mode="bilinear", align_corners=False)[:, 0]
    top, left = torch.randint(IMAGE_SIZE - DRAWN_SIZE + 1, (2, count, 1), generator=generator)
    rows, columns = torch.arange(IMAGE_SIZE) - top, torch.arange(IMAGE_SIZE) - left
    padded = F.pad(drawn, (0, 1, 0, 1))
    # Rows and columns outside the drawing read the one line of zeros that was added.
    rows[(rows < 0) | (rows > DRAWN_SIZE)] = DRAWN_SIZE
    columns[(columns < 0) | (columns > DRAWN_SIZE)] = DRAWN_SIZE
    coverage = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]
    background, foreground = _colors(count, generator)
    return torch.lerp(background, foreground, coverage).mul(255).round().to(torch.uint8)


def _colors(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return background and foreground in [0, 1], each (N, 3, 1, 1), of luminances at least MIN_CONTRAST apart."""
    luminance = torch.tensor([0.299, 0.587, 0.114])
    background = torch.rand(count, 1, 3, generator=generator)
    candidates = torch.rand(count, 8, 3, generator=generator)
    # Black and white come last: one of them always has enough contrast.
    plain = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]).expand(count, 2, 3)
    candidates = torch.cat([candidates, plain], dim=1)
    contrast = ((candidates - background) @ luminance).abs()
    first = (contrast >= MIN_CONTRAST).int().argmax(dim=1)
    foreground = candidates[torch.arange(count), first]
    return background[:, 0, :, None, None], foreground[:, :, None, None]
