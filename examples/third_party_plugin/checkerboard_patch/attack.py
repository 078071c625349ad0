"""A patch with a checkerboard of two random colors: a baseline with hard edges, without any optimization."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model, PatchAttack
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.attacks.patch_settings import PatchSettings
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.core.seeding import generator


@plugin
class Checkerboard(PatchSettings, PatchAttack):
    """A checkerboard of two random colors."""

    black_box: ClassVar[bool] = True

    cells: Annotated[int, Field(ge=1, description="cells along the height of the patch")] = 4

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
        """Draw two colors; the model and the labels are not used."""
        mask = self.mask((images.shape[-2], images.shape[-1]))
        # Patches are pictures of 8 bit.
        colors = torch.randint(256, (2, 3), generator=generator(seed, "checkerboard")) / 255
        side = max(1, mask.shape[0] // self.cells)
        rows, columns = (torch.arange(length) // side for length in mask.shape)
        texture = colors[(rows[:, None] + columns) % 2].permute(2, 0, 1)
        if progress is not None:
            progress(1, 1)
        meta = {"attack": "checkerboard", "settings": asdict(self), "target": None, "seed": seed}
        return Patch(texture=texture, mask=mask, place=self.place, keep_out=self.keep_out, meta=meta).to(images.device)
