"""PBAT's attack: a patch of its own for every image, whose place is searched together with its texture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from qadtr_brevitas.attacks.base import IterativeAttack, TargetedAttack, TrainingAttack
from qadtr_brevitas.attacks.descent import OptimizerSteps
from qadtr_brevitas.attacks.geometry import Box, place_corners
from qadtr_brevitas.attacks.losses import AttackLoss
from qadtr_brevitas.attacks.patch_settings import Index
from qadtr_brevitas.attacks.per_image import PatchTask, PerImagePatch, search_patches
from qadtr_brevitas.attacks.relocation import AllowedCorners, Relocation
from qadtr_brevitas.attacks.results import AttackGoal, AttackResult
from qadtr_brevitas.attacks.starts import start_patches
from qadtr_brevitas.core.plugin import Field, plugin

_PBAT_CENTER = 10 / 32
"""The box in the middle that PBAT leaves free, as a share of each side."""


@plugin
class LocationPatch(PerImagePatch, TrainingAttack, TargetedAttack, IterativeAttack):
    """Location-optimized patch per image (Rao, Stutz, Schiele 2020, "Adversarial Training against ... Patches").

    AP-Fixed and AP-Rand are `location=none`, AP-RandLO is `random`, AP-FullLO `full`.

    The texture follows sign steps. Once a step the patch tries to move by `stride` pixels, in one random direction or
    in all four, and goes where the loss is lowest; its texture moves with it. It never covers the middle of the image.
    The best result for every image is kept: a success before a failure, then the lower loss, over all steps, the last
    one included, and all restarts.

    A network that was trained on patches is blind to noise: evaluate it with `init=image` too.

    The paper evaluates with `steps=100 step_size=0.05 restarts=30` and trains with `steps=25 step_size=0.1` on half
    of each batch. Here one restart is the default.
    """

    share: Annotated[float, Field(gt=0, le=1, description="share of each training batch that is attacked")] = 0.5
    target: Annotated[Index | None, Field(description="class to be predicted instead; null: any wrong one")] = None
    steps: Annotated[int, Field(ge=0, description="sign steps per patch; 0: noise")] = 100
    step_size: Annotated[float, Field(gt=0, le=1, description="step in pixel values")] = 0.05
    loss: Annotated[AttackLoss, Field(description="what is descended")] = "cross-entropy"
    init: Annotated[
        Literal["image", "uniform", "gray"],
        Field(description="texture at the start; image: the best of 8 other images of the batch, shrunk to its size"),
    ] = "uniform"
    location: Annotated[
        Literal["none", "random", "full"],
        Field(description="moves tried once a step: none, in one random direction, or in all four"),
    ] = "random"
    stride: Annotated[int, Field(ge=1, description="pixels a patch moves at once")] = 2
    center: Annotated[
        float | None,
        Field(gt=0, lt=1, description="box in the middle to leave free, as a share of each side; keep_out replaces it"),
    ] = _PBAT_CENTER
    restarts: Annotated[int, Field(ge=1, description="independent runs, of which the best is kept")] = 1

    @model_validator(mode="after")
    def _a_fixed_place_does_not_move(self) -> LocationPatch:
        if self.place != "random" and self.location != "none":
            raise ValueError(f"location={self.location} moves the patch: with a fixed place give location=none")
        return self

    def goal(self, labels: Tensor) -> AttackGoal:
        return AttackGoal.of(self.target, labels, loss=self.loss)

    def results(self, task: PatchTask, generator: torch.Generator) -> Iterator[AttackResult]:
        """Yield the result of one search for each restart, at places drawn anew."""
        rule = OptimizerSteps(steps=self.steps, step_rule="sign", lr=self.step_size)
        relocate = self._relocation(task, generator)
        for _ in range(self.restarts):
            corners = self.draw_corners(task, generator)
            patches = start_patches(self.init, task, corners, generator=generator)
            yield search_patches(task.assess, patches, corners, rule=rule, steps=self.steps, relocate=relocate)

    def draw_corners(self, task: PatchTask, generator: torch.Generator) -> Tensor:
        """Return a place (N, 2) for each image's patch, outside the box in the middle."""
        size, count, box = task.patch_size, len(task.images), self._box(task.image_size)
        corners = place_corners(self.place, count, task.image_size, size, generator=generator, keep_out=box)
        return corners.to(task.images.device)

    def _relocation(self, task: PatchTask, generator: torch.Generator) -> Relocation | None:
        """Return how patches move; None if they stay."""
        if self.location == "none":
            return None
        allowed = AllowedCorners.outside(self._box(task.image_size), task.image_size, task.patch_size)
        return Relocation(allowed_corners=allowed, rule=self.location, stride=self.stride, generator=generator)

    def _box(self, image_size: tuple[int, int]) -> Box | None:
        """Return the pixels to leave free: `keep_out`, or a box in the middle."""
        if self.keep_out is not None or self.center is None:
            return self.keep_out
        height, width = (max(1, round(self.center * side)) for side in image_size)
        return (image_size[0] - height) // 2, (image_size[1] - width) // 2, height, width
