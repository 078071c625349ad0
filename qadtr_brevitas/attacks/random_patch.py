"""A patch of noise: what a patch does by covering pixels, without any optimization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model, PatchAttack
from qadtr_brevitas.attacks.fake_quantize import PATCH_FILE_BITS, fake_quantize
from qadtr_brevitas.attacks.patch import Patch, versions
from qadtr_brevitas.attacks.per_image import Attempt, ImageAttackInputs, ImagePatch
from qadtr_brevitas.attacks.starts import start_patches, start_texture
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.core.seeding import generator


@plugin
class RandomPatch(ImagePatch, PatchAttack):
    """A patch of uniform noise, the baseline every optimized patch has to beat.

    `fit` makes one for all images; `run` draws several for every image, each at a place of its own, and keeps the one
    that lowers the margin of the true class most: luck alone, with as many tries as an attack may have steps.
    """

    black_box: ClassVar[bool] = True

    draws: Annotated[int, Field(ge=1, description="patches tried on every image; one where one is made for all")] = 100

    def fit(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        held_out: tuple[Tensor, Tensor],
        seed: int,
        progress: Progress | None = None,
    ) -> Patch:
        """Draws the patch; the model and the labels are not looked at.

        Args:
            model: not called.
            images: (N, 3, H, W); only their size matters.
            labels: not used.
            held_out: not used.
            seed: the same seed gives the same patch.
            progress: called once.

        Raises:
            UsageError: the patch does not fit on the images.
        """
        mask = self.mask((images.shape[-2], images.shape[-1]))
        drawn = start_texture("uniform", (mask.shape[0], mask.shape[1]), generator=generator(seed, "random patch"))
        meta = {
            "attack": "random-patch",
            "settings": asdict(self),
            "target": None,
            "seed": seed,
            "threat_model": "universal, not optimized",
            "versions": versions(),
        }
        if progress is not None:
            progress(1, 1)
        texture = fake_quantize(drawn, PATCH_FILE_BITS)
        patch = Patch(texture=texture, mask=mask, place=self.place, keep_out=self.keep_out, meta=meta)
        return patch.to(images.device)

    def attempts(self, inputs: ImageAttackInputs) -> Iterator[Attempt]:
        """Patches of noise, each at a place of its own; the model is only asked for its outputs."""
        problem = inputs.problem(None, loss="margin")

        @torch.no_grad()
        def one_draw() -> Attempt:
            corners = self.corners(len(inputs.images), inputs.image_size, inputs.size, generator=inputs.generator)
            corners = corners.to(inputs.images.device)
            return problem.attempt(start_patches("uniform", problem, corners, generator=inputs.generator), corners)

        return (one_draw() for _ in range(self.draws))
