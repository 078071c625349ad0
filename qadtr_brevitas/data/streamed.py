"""Splits that are read from their files at each use, for pictures that do not fit into memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from hashlib import blake2b

import numpy
import torch
from PIL import Image
from torch import Tensor

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.core.files import fingerprint_facts
from qadtr_brevitas.data.decode import tell_damaged, thread_count
from qadtr_brevitas.data.listing import Pictures
from qadtr_brevitas.data.picture import Decoding
from qadtr_brevitas.data.split import Split

# Batches that are read while one is used.
_AHEAD = 2


class StreamedSplit(Split):
    """Pictures with labels, decoded when they are used; each image is that of a `Split` in memory, bit for bit.

    Args:
        pictures: where they lie.
        decoding: how they become images of one size.
        max_gb: `images` refuses to hold more than so many 10^9 bytes.
        drawn_from: how many pictures these were drawn from; None for all there are.
    """

    def __init__(self, pictures: Pictures, decoding: Decoding, *, max_gb: float, drawn_from: int | None = None) -> None:
        # The class that this one extends is frozen.
        own = {"pictures": pictures, "decoding": decoding, "max_gb": max_gb, "drawn_from": drawn_from}
        own |= {"labels": torch.tensor(pictures.labels), "classes": pictures.classes, "damaged": [], "told": set()}
        self.__dict__.update(own)
        self.pictures: Pictures
        self.decoding: Decoding
        self.max_gb: float
        self.damaged: list[str]
        self.told: set[str]

    def __repr__(self) -> str:
        # That of a `Split` shows its images, for which all would be read.
        height, width = self.image_size
        return f"StreamedSplit({len(self)} images of {height}x{width} from {self.pictures.folder})"

    @cached_property
    def images(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All images in memory, uint8 (N, 3, H, W).

        Raises:
            DataError: they need more than `max_gb`.
        """
        height, width = self.image_size
        needed = len(self) * 3 * height * width / 1e9
        if needed > self.max_gb:
            raise DataError(
                f"{len(self)} images of {height}x{width} at once need {needed:.3g} GB of memory, more than max_gb = "
                f"{self.max_gb:g}: choose fewer images, or set data.dataset.max_gb larger"
            )
        return self._read(torch.arange(len(self)))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.decoding.size

    @property
    def channels(self) -> int:
        """Numbers of each pixel."""
        return 3

    @cached_property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """32 hex digits that differ for other files, labels or decodings."""
        with ThreadPoolExecutor(thread_count()) as pool:
            files = list(pool.map(self._digest, range(len(self))))
        way = [*self.decoding.size, self.decoding.shorter, self.decoding.upright]
        return fingerprint_facts([files, self.labels.tolist(), way])

    def batch(self, indices: Tensor, *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        images = self._read(indices).to(device, non_blocking=True)
        return images.float().div_(255), self.labels[indices].to(device, non_blocking=True)

    def batches(self, size: int, *, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield all images in order, as `Split.batches`; the next ones are read on other threads meanwhile."""
        waiting: deque[tuple[Tensor, list[Future[Tensor]]]] = deque()
        with ThreadPoolExecutor(thread_count()) as pool:
            try:
                for indices in torch.arange(len(self)).split(size):
                    waiting.append((indices, [pool.submit(self.pixels, index) for index in indices.tolist()]))
                    if len(waiting) > _AHEAD:
                        yield self._collected(*waiting.popleft(), device)
                while waiting:
                    yield self._collected(*waiting.popleft(), device)
            finally:
                pool.shutdown(cancel_futures=True)

    def pixels(self, index: int) -> Tensor:
        return torch.from_numpy(numpy.ascontiguousarray(self.decoding.decode(self.pictures, index, report=self._note)))

    def whole_picture(self, index: int) -> Image.Image:
        return self.decoding.open(self.pictures, index, report=self._note)

    def pop_damaged(self) -> list[str]:
        found = [self.damaged.pop(0) for _ in range(len(self.damaged))]
        return found

    def tell(self, damaged: list[str]) -> None:
        """Tell people about damaged pictures that they were not told about yet."""
        # Each epoch meets them again.
        new = [message for message in dict.fromkeys(damaged) if message not in self.told]
        tell_damaged(new, before=len(self.told))
        self.told.update(new)

    def subset(self, indices: Tensor, *, drawn_from: int | None = None) -> StreamedSplit:
        pictures = self.pictures.pick(indices.tolist(), part="some")
        drawn_from = self.drawn_from if drawn_from is None else drawn_from
        return StreamedSplit(pictures, self.decoding, max_gb=self.max_gb, drawn_from=drawn_from)

    def _collected(
        self, indices: Tensor, pixels: list[Future[Tensor]], device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor]:
        images = torch.stack([image.result() for image in pixels]).to(device, non_blocking=True)
        self.tell(self.pop_damaged())
        return indices, images.float().div_(255), self.labels[indices].to(device, non_blocking=True)

    def _read(self, indices: Tensor) -> Tensor:
        """Return images, uint8 (n, 3, H, W)."""
        images = torch.empty(len(indices), 3, *self.image_size, dtype=torch.uint8)

        def read(place: int) -> None:
            images[place] = self.pixels(int(indices[place]))

        with ThreadPoolExecutor(thread_count()) as pool:
            # A list, so that errors are raised.
            list(pool.map(read, range(len(indices))))
        self.tell(self.pop_damaged())
        return images

    def _digest(self, index: int) -> str:
        try:
            return blake2b(self.pictures.read(index), digest_size=8).hexdigest()
        except OSError as error:
            raise DataError(f"cannot read the image {self.pictures.name(index)} ({error}): fetch it again") from error

    def _note(self, message: str) -> None:
        self.damaged.append(message)
