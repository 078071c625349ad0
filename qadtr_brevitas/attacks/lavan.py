"""LaVAN: a universal patch that lowers the true class and raises a target class, wherever it lies."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from qadtr_brevitas.attacks.patch_fields import Index, PatchFields
from qadtr_brevitas.plugin import STRICT, Field, dataclass

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qadtr_brevitas.attacks.base import Model, Progress
    from qadtr_brevitas.attacks.engine import Found, HeldOut, Search
    from qadtr_brevitas.attacks.patch import Patch

_DEFAULT_LR = {"sgd": 1.0, "sign": 0.02, "adam": 0.05}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Lavan(PatchFields):
    """Universal LaVAN patch (Karmon et al. 2018, image domain): random image, random place, values in [0, 1].

    Descends z_s - z_t, source minus target logit, averaged over a batch. Images of the target class are left out.
    With `target` null the attack is untargeted and descends z_s - max of the others.
    The paper follows the raw gradient: `step_rule=sgd cosine=false`. The defaults reach more in fewer steps.
    """

    target: Annotated[Index | None, Field(description="class to be seen instead; null: any wrong one")] = 0
    steps: Annotated[int, Field(ge=1, description="optimizer steps")] = 600
    batch_size: Annotated[int, Field(ge=1, description="images per step")] = 128
    lr: Annotated[
        float | None, Field(gt=0, description=f"step size in pixel values; null: by step rule, {_DEFAULT_LR}")
    ] = None
    step_rule: Annotated[Literal["sgd", "sign", "adam"], Field(description="how the gradient is followed")] = "adam"
    cosine: Annotated[bool, Field(description="let the step size fall to zero along a cosine")] = True
    loss: Annotated[
        Literal["logits", "cross-entropy", "margin"], Field(description="what is descended; logits: the paper's")
    ] = "logits"
    init: Annotated[Literal["uniform", "gray"], Field(description="texture at the start")] = "uniform"
    restarts: Annotated[int, Field(ge=1, description="independent runs, of which the best is kept")] = 1
    check_every: Annotated[int, Field(ge=1, description="steps between held-out scores, for keeping the best")] = 50

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
        """Makes the patch. The model's parameters get no gradients.

        Args:
            model: in evaluation mode, at the precision to attack.
            images: (N, 3, H, W), uint8 or float in [0, 1], on the model's device.
            labels: (N,).
            held_out: images and labels on which the best texture is chosen; not those of the final score.
            seed: the same seed gives the same patch.
            progress: called after every step.

        Raises:
            UsageError: the patch does not fit on the images, or the model has no class `target`.
            DataError: no images to train or to choose on.
        """
        from qadtr_brevitas.attacks.engine import HeldOut
        from qadtr_brevitas.attacks.patch import Patch, versions
        from qadtr_brevitas.errors import DataError

        mask = self.mask((images.shape[-2], images.shape[-1])).to(images.device)
        judge = HeldOut.select(model, *held_out, target=self.target, batch_size=self.batch_size)
        if self.target is not None:
            images, labels = images[labels != self.target], labels[labels != self.target]
        if len(images) == 0:
            raise DataError("there are no images to make the patch on but those of the target class: give more images")
        best: Found | None = None
        for restart in range(self.restarts):
            found = self._search(model, images, labels, mask, judge, (seed, restart), progress)
            best = found if best is None or found.score > best.score else best
        assert best is not None
        meta = {
            "attack": "lavan",
            "settings": asdict(self),
            "target": self.target,
            "seed": seed,
            "threat_model": f"universal {'untargeted' if self.target is None else 'targeted'}",
            "held_out_asr": best.score,
            "versions": versions(),
        }
        return Patch(texture=best.texture, mask=mask, place=self.place, meta=meta)

    def _search(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        mask: Tensor,
        judge: HeldOut,
        stream: tuple[int, int],
        progress: Progress | None,
    ) -> Found:
        """One run from one start; `stream` is the seed and the number of the restart."""
        import torch

        from qadtr_brevitas.attacks.engine import search_texture, start_texture
        from qadtr_brevitas.attacks.geometry import paste, place_corners
        from qadtr_brevitas.attacks.losses import attack_loss
        from qadtr_brevitas.seeding import generator

        seed, restart = stream
        size = mask.shape[0], mask.shape[1]
        places = generator(seed, "lavan places", restart)

        def put(texture: Tensor, images: Tensor, places: torch.Generator) -> Tensor:
            image_size = images.shape[-2], images.shape[-1]
            corners = place_corners(self.place, len(images), image_size, size, generator=places)
            return paste(images, texture, mask, corners)

        def objective(texture: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            targets = None if self.target is None else torch.full_like(labels, self.target)
            return attack_loss(self.loss, model(put(texture, images, places)), labels, targets).mean()

        def score(texture: Tensor) -> float:
            # The same places for every texture of every restart, so that scores compare textures and not luck.
            fixed = generator(seed, "lavan held-out places")
            return judge.success_rate(model, lambda images: put(texture, images, fixed), batch_size=self.batch_size)

        def report(step: int, best: float) -> None:
            if progress is not None:
                progress(restart * self.steps + step, self.restarts * self.steps, f"held-out ASR {max(best, 0):.1%}")

        start = start_texture(self.init, size, generator=generator(seed, "lavan start", restart)).to(images.device)
        drawn = generator(seed, "lavan batches", restart)
        return search_texture(
            start,
            images,
            labels,
            objective=objective,
            score=score,
            search=self._budget(),
            generator=drawn,
            report=report,
        )

    def _budget(self) -> Search:
        from qadtr_brevitas.attacks.engine import Search

        return Search(
            steps=self.steps,
            batch_size=self.batch_size,
            step_rule=self.step_rule,
            lr=self.lr or _DEFAULT_LR[self.step_rule],
            cosine=self.cosine,
            check_every=self.check_every,
        )
