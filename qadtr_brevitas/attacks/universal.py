"""The base class of universal patch attacks: their keys, restarts, which images count, and the facts that are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import IterativeAttack, Model, PatchAttack, TargetedAttack
from qadtr_brevitas.attacks.descent import OptimizerSteps
from qadtr_brevitas.attacks.geometry import paste
from qadtr_brevitas.attacks.held_out import HeldOut, as_float, divide_for_choice
from qadtr_brevitas.attacks.losses import AttackLoss, attack_loss
from qadtr_brevitas.attacks.patch import Patch, versions
from qadtr_brevitas.attacks.patch_settings import Index, PatchSettings
from qadtr_brevitas.attacks.starts import best_picture, start_texture
from qadtr_brevitas.attacks.texture_search import search_texture
from qadtr_brevitas.attacks.under_attack import under_attack
from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.core.plugin import Field, plugin, plugin_settings
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.core.seeding import generator

_DEFAULT_LR = {"sgd": 1.0, "sign": 0.05, "adam": 0.1}
# Larger steps of Adam wipe a picture out before they make anything of it.
_LR_FROM_PICTURE = {**_DEFAULT_LR, "adam": 0.05}

ApplyTexture: TypeAlias = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(texture (C, h, w), images, generator) -> patched images; places and transforms are drawn. Differentiable."""


@dataclass(frozen=True, kw_only=True)
class ScoredPatch:
    """A patch that one search made, and its score.

    Args:
        texture: (C, h, w) on the 8-bit grid.
        mask: boolean (h, w).
        score: success rate on the held-out images.
    """

    texture: Tensor
    mask: Tensor
    score: float


@plugin
class UniversalPatch(PatchSettings, PatchAttack, TargetedAttack, IterativeAttack):
    """One patch for all images, whose texture is optimized on many of them.

    A subclass may change how a texture is drawn into images (`apply_texture`), or search more than a texture
    (`search`).
    """

    attack: ClassVar[str]
    """Registered name."""

    target: Annotated[Index | None, Field(description="class to be predicted instead; null: any wrong one")] = 0
    steps: Annotated[int, Field(ge=1, description="optimizer steps")] = 300
    batch_size: Annotated[int, Field(ge=1, description="images per step")] = 64
    step_rule: Annotated[Literal["sgd", "sign", "adam"], Field(description="how the gradient is followed")] = "adam"
    lr: Annotated[
        float | None,
        Field(
            gt=0, description=f"step size at the start; null: by step rule, {_DEFAULT_LR}, adam 0.05 from init=image"
        ),
    ] = None
    cosine: Annotated[bool, Field(description="let the step size fall to zero along a cosine")] = True
    loss: Annotated[AttackLoss, Field(description="what is descended")] = "logits"
    init: Annotated[
        Literal["image", "uniform", "gray"],
        Field(description="texture at the start; image: the best of 64 images of the target class, shrunk to its size"),
    ] = "image"
    restarts: Annotated[
        int,
        Field(
            ge=1, description="independent runs, of which the best is kept; of init=image every second one from noise"
        ),
    ] = 1
    check_every: Annotated[int, Field(ge=1, description="steps between held-out scores, for keeping the best")] = 50

    @property
    def step_size(self) -> float:
        """The step size at the start: `lr`, or what suits the step rule and the start."""
        return self.lr or (_LR_FROM_PICTURE if self.init == "image" else _DEFAULT_LR)[self.step_rule]

    def apply_texture(self, mask: Tensor) -> ApplyTexture:
        """Return the function that draws a texture into images, given the pixels it covers.

        Every image gets the texture at a place of its own.
        """
        size = mask.shape[0], mask.shape[1]

        def paste_at_places(texture: Tensor, images: Tensor, generator: torch.Generator) -> Tensor:
            image_size = images.shape[-2], images.shape[-1]
            corners = self.corners(len(images), image_size, size, generator=generator)
            return paste(images, texture, mask, corners)

        return paste_at_places

    def search(self, search: UniversalSearch, mask: Tensor) -> ScoredPatch:
        """Run one search from one start, under the mask of these settings."""
        return search_under_mask(search, mask)

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
        """Make the patch. The model's parameters receive no gradients.

        Args:
            model: at the precision to attack; a module is put in evaluation mode meanwhile.
            images: (N, C, H, W), uint8 or float in [0, 1], on the model's device.
            labels: (N,), the true classes.
            held_out: images and labels on which the best texture is chosen, not those of the final score; None to take
                a fifth of the images for it.
            seed: the same seed gives the same patch.
            progress: called after every step.

        Raises:
            UsageError: the patch does not fit on the images, or the model has no class `target`.
            DataError: there are no images to make the patch on or to choose it on.
            TrainingError: the texture is no longer finite.
        """
        mask = self.mask((images.shape[-2], images.shape[-1])).to(images.device)
        if held_out is None:
            images, labels, held_out = divide_for_choice(images, labels, seed=seed)
        with under_attack(model):
            first = self._first_search(model, images, labels, held_out=held_out, seed=seed, progress=progress)
            restarts = (
                replace(first, attack=self._restarted(number), restart=number) for number in range(self.restarts)
            )
            best = max((restart.attack.search(restart, mask) for restart in restarts), key=lambda patch: patch.score)
        meta = {
            "attack": self.attack,
            "settings": plugin_settings(self),
            "target": self.target,
            "seed": seed,
            "threat_model": f"universal {'untargeted' if self.target is None else 'targeted'}",
            "held_out_asr": best.score,
            "versions": versions(),
        }
        return Patch(texture=best.texture, mask=best.mask, place=self.place, keep_out=self.keep_out, meta=meta)

    def _first_search(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        held_out: tuple[Tensor, Tensor],
        seed: int,
        progress: Progress | None,
    ) -> UniversalSearch:
        """Sort out which images the patch is made on, started from and chosen on."""
        chosen_on = HeldOut.select(model, *held_out, target=self.target, batch_size=self.batch_size)
        pictures = images
        if self.target is not None:
            others = labels != self.target
            images, labels, pictures = images[others], labels[others], images[~others]
        if len(images) == 0:
            raise DataError("all images to make the patch on are of the target class: give images of other classes")
        if self.init == "image" and len(pictures) == 0:
            raise DataError(
                f"there is no image of class {self.target} to start from: give more images, or init=uniform"
            )
        return UniversalSearch(
            attack=self,
            model=model,
            images=images,
            labels=labels,
            pictures=pictures,
            held_out=chosen_on,
            seed=seed,
            restart=0,
            progress=progress,
        )

    def _restarted(self, restart: int) -> UniversalPatch:
        """Return the settings of one restart: if restarts begin at pictures, every second one begins at noise.

        Networks that were trained on patches are blind to noise; on others its larger steps may come further.
        """
        return replace(self, init="uniform") if self.init == "image" and restart % 2 else self


@dataclass(frozen=True, kw_only=True)
class UniversalSearch:
    """One restart of a universal patch attack: its images, its random streams, its loss and its score.

    Args:
        attack: the attack and its settings.
        model: the model under attack.
        images: (N, C, H, W), those of the target class left out.
        labels: (N,).
        pictures: (M, C, H, W), what `init=image` starts from: images of the target class, or all.
        held_out: the images that choose the patch.
        seed: of the whole attack.
        restart: number of this restart, from 0.
        progress: called after every step.
    """

    attack: UniversalPatch
    model: Model
    images: Tensor
    labels: Tensor
    pictures: Tensor
    held_out: HeldOut
    seed: int
    restart: int
    progress: Progress | None

    def stream(self, purpose: str) -> torch.Generator:
        """Return the random draws of this restart for one purpose."""
        return generator(self.seed, self.attack.attack, purpose, self.restart)

    def loss(self, patched: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, averaged over a batch of patched images."""
        target = self.attack.target
        targets = None if target is None else torch.full_like(labels, target)
        return attack_loss(self.attack.loss, self.model(patched), labels, targets).mean()

    def score(self, apply_texture: ApplyTexture, texture: Tensor) -> float:
        """Return the success rate on the held-out images."""
        # The same places for every texture of every restart, so that scores compare textures and not luck.
        places = generator(self.seed, self.attack.attack, "held-out places")
        return self.held_out.success_rate(
            self.model, lambda images: apply_texture(texture, images, places), batch_size=self.attack.batch_size
        )

    def report(self, step: int, best: float) -> None:
        """Report how far this restart is."""
        if self.progress is not None:
            steps = self.attack.steps
            self.progress(self.restart * steps + step, self.attack.restarts * steps, f"held-out ASR {best:.1%}")

    def start_texture(self, size: tuple[int, int], apply_texture: ApplyTexture) -> Tensor:
        """Return the texture (C, h, w) that this restart begins with.

        Args:
            size: (h, w) in pixels.
            apply_texture: how it will be drawn into images.
        """
        draws = self.stream("start")
        if self.attack.init != "image":
            start = start_texture(self.attack.init, size, channels=self.images.shape[1], generator=draws)
            return start.to(self.images.device)
        index = torch.randperm(len(self.images), generator=draws)[: self.attack.batch_size].to(self.images.device)
        images, labels = as_float(self.images[index]), self.labels[index]

        def loss(picture: Tensor) -> float:
            # The same places for every picture.
            return self.loss(apply_texture(picture, images, self.stream("start places")), labels).item()

        return best_picture(as_float(self.pictures), size, loss=loss, generator=draws)


def search_under_mask(
    search: UniversalSearch, mask: Tensor, *, start: Tensor | None = None, steps_done: int = 0
) -> ScoredPatch:
    """Search the texture under a mask that does not change.

    Args:
        search: the restart.
        mask: boolean (h, w), on the device to compute on.
        start: (C, h, w) in [0, 1]; None for the attack's own start.
        steps_done: how many of the restart's steps are used up.

    Raises:
        TrainingError: the texture is no longer finite.
    """
    attack, places = search.attack, search.stream("places")
    apply_texture = attack.apply_texture(mask)
    steps = attack.steps - steps_done
    best = search_texture(
        search.start_texture((mask.shape[0], mask.shape[1]), apply_texture) if start is None else start,
        search.images,
        search.labels,
        loss=lambda texture, images, labels: search.loss(apply_texture(texture, images, places), labels),
        score=lambda texture: search.score(apply_texture, texture),
        rule=OptimizerSteps(steps=steps, step_rule=attack.step_rule, lr=attack.step_size, cosine=attack.cosine),
        batch_size=attack.batch_size,
        check_every=attack.check_every,
        generator=search.stream("batches"),
        report=lambda step, score: search.report(steps_done + step, score),
    )
    return ScoredPatch(texture=best.texture, mask=mask, score=best.score)
