"""Patches at other places and angles than those they were made for: fixed, shifted and rotated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qadtr_brevitas.attacks.fake_quantize import PATCH_FILE_BITS, fake_quantize
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.attacks.transforms import rotate_patch
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.entries import NamedPatch
from qadtr_brevitas.evaluation.report import VariantFacts


@dataclass(frozen=True, kw_only=True)
class PatchVariants:
    """The variants to make of each patch: one at a fixed place, one for each shift and one for each angle.

    Args:
        at: row and column of the top left pixel; None leaves patches where they are made for.
        shifts: pixels to move down and to the right from there.
        degrees: angles to rotate by about the middle, counterclockwise.
    """

    at: tuple[int, int] | None = None
    shifts: Sequence[int] = ()
    degrees: Sequence[float] = ()

    def variants(self, patches: Sequence[NamedPatch], image_size: tuple[int, int]) -> list[NamedPatch]:
        """Return the variants of every patch.

        Args:
            patches: as they were made.
            image_size: (H, W) in pixels.

        Raises:
            UsageError: shifts of a patch without a fixed place, or a variant that does not fit on the image.
        """
        return [variant for patch_entry in patches for variant in self._of(patch_entry, image_size)]

    def _of(self, patch_entry: NamedPatch, image_size: tuple[int, int]) -> Iterator[NamedPatch]:
        patch = patch_entry.patch if self.at is None else replace(patch_entry.patch, place=self.at)
        if patch.place != patch_entry.patch.place:
            yield self._variant(patch_entry, patch)
        for shift in self.shifts:
            yield self._variant(patch_entry, _shifted(patch, shift, image_size, name=patch_entry.name), shift=shift)
        for degrees in self.degrees:
            yield self._variant(patch_entry, _rotated(patch, degrees, image_size), degrees=degrees)

    def _variant(self, patch_entry: NamedPatch, patch: Patch, *, shift: int = 0, degrees: float = 0) -> NamedPatch:
        facts = VariantFacts(of=patch_entry.name, at=self.at, shift=shift, degrees=degrees)
        return replace(patch_entry, name=f"{patch_entry.name} {facts.label}", patch=patch, variant=facts)


def _shifted(patch: Patch, shift: int, image_size: tuple[int, int], *, name: str) -> Patch:
    if patch.place == "random":
        raise UsageError(f"patch {name!r} has no place to be shifted from: give one with --at ROW,COL")
    row, column = patch.place
    most = min(image_size[0] - patch.size[0] - row, image_size[1] - patch.size[1] - column)
    if shift > most:
        raise UsageError(
            f"patch {name!r} at row {row}, column {column} cannot be shifted by {shift} pixels, it would leave the "
            f"{image_size[0]}x{image_size[1]} image: give --shift up to {max(most, 0)}"
        )
    return replace(patch, place=(row + shift, column + shift))


def _rotated(patch: Patch, degrees: float, image_size: tuple[int, int]) -> Patch:
    """Return a patch turned about its middle, and moved into the image where its corners would stick out."""
    rotated = rotate_patch(patch.texture, patch.mask, degrees)
    place = patch.place
    if place != "random":
        row, column = (
            max(0, min(start + offset, side - after))
            for start, offset, after, side in zip(place, rotated.offset, rotated.mask.shape, image_size, strict=True)
        )
        place = row, column
    return replace(patch, texture=fake_quantize(rotated.texture, PATCH_FILE_BITS), mask=rotated.mask, place=place)
