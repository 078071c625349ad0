"""A patch of noise: what a patch does by covering pixels, without any optimization."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from qadtr_brevitas.attacks.patch_fields import PatchFields
from qadtr_brevitas.plugin import STRICT, dataclass

if TYPE_CHECKING:
    from torch import Tensor

    from qadtr_brevitas.attacks.base import Model, Progress
    from qadtr_brevitas.attacks.patch import Patch


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RandomPatch(PatchFields):
    """A patch of uniform noise, the baseline every optimized patch has to beat."""

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
        from qadtr_brevitas.attacks.engine import start_texture
        from qadtr_brevitas.attacks.fake_quantize import PATCH_FILE_BITS, fake_quantize
        from qadtr_brevitas.attacks.patch import Patch, versions
        from qadtr_brevitas.seeding import generator

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
