"""Where patches may lie, and moving them there if that lowers the loss (PBAT's location optimization)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qadtr_brevitas.attacks.geometry import Box, corners_outside
from qadtr_brevitas.attacks.per_image import Attempt, PatchProblem

_DIRECTIONS = torch.tensor([(-1, 0), (1, 0), (0, -1), (0, 1)])


@dataclass(frozen=True)
class AllowedCorners:
    """The corners where patches may be.

    Args:
        allowed: boolean (rows, columns).
    """

    allowed: Tensor

    @classmethod
    def outside(cls, box: Box | None, image_size: tuple[int, int], patch_size: tuple[int, int]) -> AllowedCorners:
        """Wherever a patch lies on the image and does not touch the box.

        Raises:
            UsageError: there is no such place.
        """
        allowed = torch.ones(image_size[0] - patch_size[0] + 1, image_size[1] - patch_size[1] + 1, dtype=torch.bool)
        if box is None:
            return cls(allowed)
        rows, columns = corners_outside(box, image_size, patch_size).unbind(1)
        return cls(torch.zeros_like(allowed).index_put_((rows, columns), torch.tensor(True)))

    def shifted(self, corners: Tensor, offsets: Tensor) -> Tensor:
        """Corners (N, 2) plus offsets (N, 2). Moves over the border end at it; forbidden ones are not made."""
        last = corners.new_tensor(self.allowed.shape) - 1
        places = (corners + offsets.to(corners.device)).clamp(min=torch.zeros_like(last), max=last)
        allowed = self.allowed.to(corners.device)[places[:, 0], places[:, 1]]
        return torch.where(allowed[:, None], places, corners)


@dataclass(frozen=True, kw_only=True)
class Relocation:
    """Tries to move patches; called once a step of the search.

    Args:
        allowed_corners: where they may be.
        rule: `random` tries one direction for each image (one forward pass), `full` all four.
        stride: pixels.
        generator: draws directions.
    """

    allowed_corners: AllowedCorners
    rule: Literal["random", "full"]
    stride: int
    generator: torch.Generator

    @torch.no_grad()
    def __call__(
        self, problem: PatchProblem, patches: Tensor, corners: Tensor, attempt: Attempt
    ) -> tuple[Tensor, Attempt]:
        """Corners (N, 2) after the moves that lower the loss, and the attempt there."""
        start = corners
        for directions in self._directions(len(corners)):
            places = self.allowed_corners.shifted(start, self.stride * directions)
            tried = problem.attempt(patches, places)
            lower = tried.losses < attempt.losses
            corners = torch.where(lower[:, None], places, corners)
            attempt = attempt.replaced(tried, lower)
        return corners, attempt

    def _directions(self, count: int) -> list[Tensor]:
        """What to try, one after the other: (N, 2) each."""
        if self.rule == "full":
            return [direction.expand(count, 2) for direction in _DIRECTIONS]
        drawn = torch.randint(len(_DIRECTIONS), (count,), generator=self.generator, device=self.generator.device)
        return [_DIRECTIONS.to(drawn.device)[drawn]]
