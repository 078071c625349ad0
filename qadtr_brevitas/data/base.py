"""The contract of data sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Self

from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.split import Split


class Dataset(ABC):
    """A data set plug-in: loads labeled images, split by split."""

    @abstractmethod
    def load(self, split: str, *, limit: int | None = None, seed: int = 0, progress: Progress | None = None) -> Split:
        """Load the images of one split.

        Args:
            split: `train` or `test`.
            limit: at most this many images, drawn by class as `Split.balanced` does; None for all.
            seed: decides which images a limit leaves, and whatever else is drawn.
            progress: called with the images done and the images in all.

        Raises:
            UsageError: the split has another name.
            DataError: images are missing or damaged.
        """

    def needs_size(self) -> bool:
        """Return whether images have different sizes, so that a model has to say which one it takes."""
        return False

    def fitted(self, image_size: int, crop: float) -> Self:
        """Return this data set with images of a model's size.

        Args:
            image_size: height and width in pixels.
            crop: share of the shorter side that the center crop keeps, in (0, 1].
        """
        return self

    def with_whole_pictures(self) -> Self:
        """Return this data set with a training split that offers pictures as large as they are, where there are such.

        Random crops are cut from them, not from images that were made smaller before.
        """
        return self

    def completed(self, needed: Collection[str]) -> tuple[Self, str | None]:
        """Return this data set with every split that is needed, and what was decided for that, in words.

        Args:
            needed: splits that will be loaded.

        Returns:
            The data set, with images held out where they all lie in one place; and a sentence that says so, or None if
            nothing had to be decided.
        """
        return self, None
