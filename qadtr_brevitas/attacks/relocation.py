"""Where patches may lie, and moving them there if that lowers the loss (PBAT's location optimization)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qadtr_brevitas.attacks.geometry import Box, corners_outside, fixed_corners
from qadtr_brevitas.attacks.image_streams import ImageStreams
from qadtr_brevitas.attacks.per_image import AssessPatches
from qadtr_brevitas.attacks.results import AttackResult

_DIRECTIONS = torch.tensor([(-1, 0), (1, 0), (0, -1), (0, 1)])


@dataclass(frozen=True)
class AllowedCorners:
    """The corners where patches may lie.

    Args:
        allowed: boolean (rows, columns), one entry for each corner where a patch fits on the image.
    """

    allowed: Tensor

    @classmethod
    def outside(cls, box: Box | None, image_size: tuple[int, int], patch_size: tuple[int, int]) -> AllowedCorners:
        """Return the corners where a patch lies on the image and does not touch the box.

        Raises:
            UsageError: there is no such place.
        """
        allowed = torch.ones(image_size[0] - patch_size[0] + 1, image_size[1] - patch_size[1] + 1, dtype=torch.bool)
        if box is None:
            return cls(allowed)
        rows, columns = corners_outside(box, image_size, patch_size).unbind(1)
        return cls(torch.zeros_like(allowed).index_put_((rows, columns), torch.tensor(True)))

    @classmethod
    def only(cls, corner: tuple[int, int], image_size: tuple[int, int], patch_size: tuple[int, int]) -> AllowedCorners:
        """Return one corner alone.

        Raises:
            UsageError: the patch does not fit there.
        """
        fixed_corners(corner, 1, image_size, patch_size)
        everywhere = cls.outside(None, image_size, patch_size).allowed
        return cls(torch.zeros_like(everywhere).index_put_(torch.tensor(corner).split(1), torch.tensor(True)))

    def draw(self, streams: ImageStreams, count: int) -> Tensor:
        """Draw one of the corners (count, 2) for each image."""
        corners = self.allowed.nonzero().to(streams.seeds.device)
        return corners[streams.integers(0, len(corners), count)]

    def shifted(self, corners: Tensor, offsets: Tensor) -> Tensor:
        """Return corners (N, 2) plus offsets (N, 2).

        Moves over the border end at it; moves to a corner that is not allowed are not made.
        """
        last = corners.new_tensor(self.allowed.shape) - 1
        places = (corners + offsets.to(corners.device)).clamp(min=torch.zeros_like(last), max=last)
        allowed = self.allowed.to(corners.device)[places[:, 0], places[:, 1]]
        return torch.where(allowed[:, None], places, corners)


@dataclass(frozen=True, kw_only=True)
class Relocation:
    """Moves patches where that lowers the loss; called once a step of the search.

    Args:
        allowed_corners: where patches may lie.
        rule: `random` tries one direction for each image (one forward pass), `full` all four.
        stride: length of a move in pixels.
        generator: draws directions.
    """

    allowed_corners: AllowedCorners
    rule: Literal["random", "full"]
    stride: int
    generator: torch.Generator

    @torch.no_grad()
    def __call__(
        self, assess: AssessPatches, patches: Tensor, corners: Tensor, result: AttackResult
    ) -> tuple[Tensor, AttackResult]:
        """Return corners (N, 2) after the moves that lower the loss, and the result there."""
        start = corners
        for directions in self._directions(len(corners)):
            places = self.allowed_corners.shifted(start, self.stride * directions)
            moved = assess(patches, places)
            lower = moved.losses < result.losses
            corners = torch.where(lower[:, None], places, corners)
            result = result.replace_where(lower, moved)
        return corners, result

    def _directions(self, count: int) -> list[Tensor]:
        """Return the directions to try one after the other, (N, 2) each."""
        if self.rule == "full":
            return [direction.expand(count, 2) for direction in _DIRECTIONS]
        drawn = torch.randint(len(_DIRECTIONS), (count,), generator=self.generator, device=self.generator.device)
        return [_DIRECTIONS.to(drawn.device)[drawn]]
