"""The adaptive attack on a defended prediction as a plug-in, for `evaluate --defend`."""

from __future__ import annotations

from typing import Annotated, Literal, cast

import torch
from torch import Tensor, nn

from qadtr_brevitas.attacks.base import DefenseAttack, IterativeAttack
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.evaluation.adaptive_patch import adaptive_patches
from qadtr_brevitas.evaluation.defended import DefendedModel


@plugin
class AdaptivePatch(DefenseAttack, IterativeAttack):
    """A patch where PatchCleanser's two-mask test fails, with a texture that fools the masks that do not cover it.

    It attacks predictions defended by double masking (`--defend`), and no others. The place is known from the image
    without a patch: a mask over the patch hides it, so that a second mask has to contradict it (666 forward passes of
    each image with 6 masks along a side, 10,440 if masks overlap by 2). Then the texture is searched, with `masks`
    forward and backward passes in each step, and every tenth step is shown to the defense. An image whose prediction is
    certified has no such place, and is attacked where the fewest masks stand. Give `location-patch` with `init: image`
    too, which may break more.
    """

    size: Annotated[int | None, Field(ge=1, description="side in pixels; null: the size that is defended against")] = (
        None
    )
    init: Annotated[
        Literal["image", "uniform"],
        Field(description="texture at the start; image: the best of 8 other images of the batch, shrunk to its size"),
    ] = "image"
    steps: Annotated[int, Field(ge=1, description="sign steps of the texture")] = 50
    step_size: Annotated[float, Field(gt=0, le=1, description="step in pixel values")] = 0.05
    masks: Annotated[int, Field(ge=1, description="masks that a step averages over")] = 6
    restarts: Annotated[int, Field(ge=1, description="searches, each at the next best place")] = 2

    def accepts(self, network: nn.Module) -> bool:
        return isinstance(network, DefendedModel) and network.certification.method == "double masking"

    def run_against(self, defended: nn.Module, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        found = adaptive_patches(
            cast(DefendedModel, defended),
            images,
            labels,
            size=self.size,
            init=self.init,
            steps=self.steps,
            step_size=self.step_size,
            masks_per_step=self.masks,
            restarts=self.restarts,
            generator=generator,
        )
        return found.images
