"""Read images and labels from the forms of a PyTorch program: a DataLoader, a list of batches, a tensor, a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.data.split import Split, numbered

Loader: TypeAlias = "DataLoader[Any] | Dataset[Any] | Tensor | Split | Iterable[Any]"
"""Batches of images, or of (images, labels): a DataLoader, a list or another iterable of batches, one tensor of images,
a dataset of torch or torchvision, or a `Split`. Images are (N, C, H, W), uint8 or float in [0, 1]."""

_BATCH = 64
_IMAGE_KEYS = ("image", "images", "pixel_values", "img")
_LABEL_KEYS = ("label", "labels", "target", "targets", "fine_label")


class ImageBatches(Sized, Iterable[Tensor]):
    """Batches of images alone, float32 (n, C, H, W) in [0, 1], which can be iterated several times.

    Args:
        loader: source of the images; an iterator is read into memory.
        device: device of the batches; None to leave them where they are.

    Raises:
        DataError: there are no images, or pixels are not in [0, 1].
    """

    def __init__(self, loader: Loader, *, device: torch.device | str | None = None) -> None:
        self._batches = _batches(loader)
        self._device = device
        if len(self._batches) == 0:
            raise DataError("there are no images in the loader: give at least one batch")

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        for number, batch in enumerate(self._batches):
            images = _as_float(_images_and_labels(batch)[0], number)
            yield images if self._device is None else images.to(self._device)


def read_split(loader: Loader, *, classes: Sequence[str] | int) -> Split:
    """Read labeled images into memory, rounded to the 8 bit of cameras and image files.

    Args:
        loader: batches of (images, labels).
        classes: names of the classes, or their number.

    Raises:
        DataError: there are no images or no labels, or a label is out of range.
    """
    if isinstance(loader, Split):
        return loader
    names = numbered(classes) if isinstance(classes, int) else tuple(classes)
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for number, batch in enumerate(_batches(loader)):
        pixels, given = _images_and_labels(batch)
        if given is None:
            raise DataError(
                f"batch {number} of the loader has images and no labels: give batches of (images, labels), "
                "for instance a torch.utils.data.DataLoader over a torchvision dataset"
            )
        images.append((_as_float(pixels, number) * 255).round().to(torch.uint8).cpu())
        labels.append(_checked_labels(given, len(pixels), len(names), number))
    if not images:
        raise DataError("there are no images in the loader: give at least one batch")
    return Split(torch.cat(images), torch.cat(labels), names)


def _batches(loader: Loader) -> Sequence[Any] | DataLoader[Any]:
    """Return batches that can be counted and iterated several times."""
    if isinstance(loader, DataLoader):
        return loader
    if isinstance(loader, Split):
        return [loader.batch(part) for part in torch.arange(len(loader)).split(_BATCH)]
    if isinstance(loader, Tensor):
        return list(loader.split(_BATCH))
    if isinstance(loader, Dataset):
        return DataLoader(loader, batch_size=_BATCH)
    if isinstance(loader, Sequence) and len(loader) == 2 and _is_pair(loader):
        return [tuple(loader)]
    if isinstance(loader, Sized) and hasattr(loader, "__getitem__"):
        return loader  # pyright: ignore[reportReturnType]
    return list(loader)


def _is_pair(given: Sequence[Any]) -> bool:
    """Return whether two items are (images, labels), and not two batches of images."""
    first, second = given
    return isinstance(first, Tensor) and isinstance(second, Tensor) and first.ndim == 4 and second.ndim == 1


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in _IMAGE_KEYS if key in batch), None)
        labels = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    else:
        images, labels = (*batch, None)[:2] if isinstance(batch, (tuple, list)) and batch else (None, None)
    if not isinstance(images, Tensor):
        raise DataError(
            f"a batch of the loader is {type(batch).__name__}: give tensors of images (N, C, H, W), "
            "or pairs of images and labels"
        )
    return images, None if labels is None else torch.as_tensor(labels)


def _as_float(images: Tensor, number: int) -> Tensor:
    if images.ndim != 4:
        raise DataError(f"batch {number} has the shape {tuple(images.shape)}: images are (N, C, H, W)")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise DataError(f"batch {number} is of {images.dtype}: images are torch.uint8, or floats in [0, 1]")
    low, high = (float(end) for end in torch.aminmax(images))
    if not 0 <= low <= high <= 1:
        raise DataError(
            f"pixels of batch {number} go from {low:.3g} to {high:.3g}, they must lie in [0, 1]: leave Normalize out "
            "of the transforms, the converted model normalizes by itself"
        )
    return images.float()


def _checked_labels(labels: Tensor, images: int, classes: int, number: int) -> Tensor:
    labels = labels.cpu()
    if labels.shape != (images,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(
            f"labels of batch {number} are {labels.dtype} of shape {tuple(labels.shape)}: "
            f"give one integer for each of its {images} images"
        )
    if images and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"labels of batch {number} go from {int(labels.min())} to {int(labels.max())}: "
            f"the model has the classes 0 to {classes - 1}"
        )
    return labels.to(torch.int64)
