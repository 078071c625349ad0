"""The images of a training step before they are attacked: which ones, and how changed, from (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.seeding import derive_seed, generator
from qadtr_brevitas.data.augment import crop_and_flip
from qadtr_brevitas.data.loader import BatchLoader, Request, worker_count
from qadtr_brevitas.data.mixing import Mixing
from qadtr_brevitas.data.split import Split, epoch_order
from qadtr_brevitas.data.streamed import StreamedSplit
from qadtr_brevitas.data.transform import TrainingTransform

_MIXING_KEYS = {"mixup", "cutmix", "mix_probability", "cutmix_probability"}


class ImageBatch(NamedTuple):
    """One process's share of a batch.

    Args:
        images: (n, C, H, W) in [0, 1].
        labels: (n,), of mixed images the class of the larger share.
        targets: (n, classes), the shares of the classes in mixed images; None where images are not mixed.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor | None = None

    def parts(self, count: int) -> list[ImageBatch]:
        """Return so many parts, each with every `count`-th image; one part is the batch itself."""
        if count == 1:
            return [self]
        shares = [None if self.targets is None else self.targets[start::count] for start in range(count)]
        return [ImageBatch(self.images[i::count], self.labels[i::count], shares[i]) for i in range(count)]


class ImageSource:
    """The training images of one process, in the order and with the changes that the recipe says.

    Images in memory that are only cropped and mirrored are made when they are asked for. Worker processes read ahead
    what is streamed or transformed.

    Args:
        recipe: seed, batch size, augmentation and transforms.
        split: training images.
        rank: number of this process.
        processes: how many there are.
        device: where batches go.

    Raises:
        UsageError: images are mixed, and the share of a process is odd.
    """

    def __init__(
        self, recipe: Recipe, split: Split, rank: int = 0, processes: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self._recipe, self.split = recipe, split
        self._rank, self._processes, self._device = rank, processes, torch.device(device)
        transform, mixing = recipe.data.transform, None
        size = recipe.train.batch_size
        if transform is not None and transform.mixes:
            if size // processes % 2:
                raise UsageError(
                    f"train.batch_size={size} gives each of {processes} processes an odd number of images, which "
                    f"data.transform cannot mix: give a multiple of {2 * processes}"
                )
            mixing = Mixing(classes=len(split.classes), **transform.model_dump(include=_MIXING_KEYS))
        self._mixing = mixing
        self._loader = None
        if transform is not None or isinstance(split, StreamedSplit):
            changes = transform and TrainingTransform(
                size=split.image_size, **transform.model_dump(exclude={*_MIXING_KEYS, "force_color_jitter"})
            )
            self._loader = BatchLoader(
                split,
                changes,
                self._request,
                seed=recipe.seed,
                workers=worker_count(recipe.data.workers, processes),
                pin=self._device.type == "cuda",
            )

    def batch(self, step: int) -> ImageBatch:
        """Return this process's images of a step.

        Every `processes`-th image of the global batch: all processes together see what a single one would, and the
        attacked first share of each is the first share of the global batch.

        Raises:
            DataError: an image cannot be read, or a process that reads them was killed.
        """
        request = self._request(step)
        if self._loader is None:
            images, labels = self.split.batch(request.indices, device=self._device)
        else:
            images, labels = self._on_device(self._loader.pixels(step), request)
        return self._changed(images, labels, step, self._rank)

    def norm_batch(self, index: int) -> Tensor:
        """Return images (n, C, H, W) of a whole batch that no step sees, with the changes of training.

        Raises:
            DataError: an image cannot be read.
        """
        size = self._recipe.train.batch_size
        order = _epoch_order(len(self.split), self._recipe.seed, -1)
        request = Request(-1, order[index * size : (index + 1) * size])
        if self._loader is None:
            images, labels = self.split.batch(request.indices, device=self._device)
        else:
            images, labels = self._on_device(self._loader.read(request), request)
        return self._changed(images, labels, "norms", index).images

    def close(self) -> None:
        """End the processes that read ahead."""
        if self._loader is not None:
            self._loader.close()

    def _request(self, step: int) -> Request:
        size = self._recipe.train.batch_size
        epoch, position = divmod(step, len(self.split) // size)
        order = _epoch_order(len(self.split), self._recipe.seed, epoch)
        return Request(epoch, order[position * size : (position + 1) * size][self._rank :: self._processes])

    def _on_device(self, pixels: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        images = pixels.to(self._device, non_blocking=True).float().div_(255)
        return images, self.split.labels[request.indices].to(self._device, non_blocking=True)

    def _changed(self, images: Tensor, labels: Tensor, *keys: int | str) -> ImageBatch:
        """Return images with the changes that are made to a batch at once."""
        data, seed = self._recipe.data, self._recipe.seed
        if data.transform is None:
            if data.augment == "none":
                return ImageBatch(images, labels)
            rng = generator(seed, "augment", *keys)
            return ImageBatch(crop_and_flip(images, flip=data.augment == "crop-flip", generator=rng), labels)
        if self._mixing is None:
            return ImageBatch(images, labels)
        return ImageBatch(*self._mixing(images, labels, seed=derive_seed(seed, "mixing", *keys)))


class NormBatches(Sequence[Tensor]):
    """Random training images (n, C, H, W) in [0, 1] to recalibrate norm statistics on, made when they are read.

    They are changed as in training but not attacked. Statistics of unaugmented images do not fit a network that was
    trained on shifted images with black borders (digits: 71 % instead of 87 %).

    Args:
        recipe: number and size of batches.
        source: training images; no more whole batches are made than they fill.
    """

    def __init__(self, recipe: Recipe, source: ImageSource) -> None:
        self._source = source
        # Whole batches only: each counts the same in the mean.
        self._count = min(recipe.train.norm_batches, len(source.split) // recipe.train.batch_size)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._source.norm_batch(index)


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    return epoch_order(count, seed=seed, epoch=epoch)
