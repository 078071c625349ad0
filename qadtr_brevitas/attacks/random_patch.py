"""A patch of noise: what a patch does by covering pixels, without any optimization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model, PatchAttack
from qadtr_brevitas.attacks.fake_quantize import PATCH_FILE_BITS, fake_quantize
from qadtr_brevitas.attacks.patch import Patch, versions
from qadtr_brevitas.attacks.per_image import PatchTask, PerImagePatch
from qadtr_brevitas.attacks.results import AttackGoal, AttackResult
from qadtr_brevitas.attacks.starts import start_patches, start_texture
from qadtr_brevitas.core.plugin import Field, plugin, plugin_settings
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.core.seeding import generator


@plugin
class RandomPatch(PerImagePatch, PatchAttack):
    """A patch of uniform noise, the baseline that every optimized patch has to beat.

    `fit` makes one for all images; `run` draws several for every image, each at a place of its own, and keeps the one
    that lowers the margin of the true class most. Only luck helps it, with as many tries as an attack may have steps.
    """

    black_box: ClassVar[bool] = True

    draws: Annotated[int, Field(ge=1, description="patches tried on every image; a universal patch is drawn once")] = (
        100
    )

    def fit(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        held_out: tuple[Tensor, Tensor] | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Patch:
        """Draw the patch; the model and the labels are not used.

        Args:
            model: not called.
            images: (N, C, H, W); only their shape is used.
            labels: not used.
            held_out: not used.
            seed: the same seed gives the same patch.
            progress: called once.

        Raises:
            UsageError: the patch does not fit on the images.
        """
        mask = self.mask((images.shape[-2], images.shape[-1]))
        draws = generator(seed, "random patch")
        drawn = start_texture("uniform", (mask.shape[0], mask.shape[1]), channels=images.shape[1], generator=draws)
        meta = {
            "attack": "random-patch",
            "settings": plugin_settings(self),
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

    def goal(self, labels: Tensor) -> AttackGoal:
        return AttackGoal.of(None, labels, loss="margin")

    def results(self, task: PatchTask, generator: torch.Generator) -> Iterator[AttackResult]:
        """Yield the results of patches of noise, each at a place of its own; only outputs of the model are used."""

        @torch.no_grad()
        def one_draw() -> AttackResult:
            corners = self.draw_corners(task, generator)
            return task.assess(start_patches("uniform", task, corners, generator=generator), corners)

        return (one_draw() for _ in range(self.draws))
