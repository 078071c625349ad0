"""What universal patch attacks share: which images count, restarts, choosing the best, the facts that are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model, PatchAttack
from qadtr_brevitas.attacks.engine import HeldOut, Search, as_float, search_texture
from qadtr_brevitas.attacks.geometry import paste
from qadtr_brevitas.attacks.losses import attack_loss
from qadtr_brevitas.attacks.patch import Patch, versions
from qadtr_brevitas.attacks.patch_fields import Index, PatchFields
from qadtr_brevitas.attacks.starts import best_picture, start_texture
from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.core.seeding import generator

_DEFAULT_LR = {"sgd": 1.0, "sign": 0.05, "adam": 0.1}
# Larger steps of Adam wipe a picture out before they make anything of it.
_LR_FROM_PICTURE = {**_DEFAULT_LR, "adam": 0.05}

Put: TypeAlias = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Puts a texture (3, h, w) on images, at places and with transforms drawn from the generator; differentiable."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A patch that a search found, and how it did on the held-out images.

    Args:
        texture: (3, h, w) on the 8-bit grid.
        mask: boolean (h, w).
        score: held-out success rate.
    """

    texture: Tensor
    mask: Tensor
    score: float


@plugin
class SearchFields(PatchFields, PatchAttack):
    """How the texture of a universal patch is searched.

    A subclass may say how a texture gets on images (`put`), or search more than a texture (`search`).
    """

    attack: ClassVar[str]
    """Registered name."""

    target: Annotated[Index | None, Field(description="class to be seen instead; null: any wrong one")] = 0
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
    loss: Annotated[Literal["logits", "cross-entropy", "margin"], Field(description="what is descended")] = "logits"
    init: Annotated[
        Literal["image", "uniform", "gray"],
        Field(description="texture at the start; image: the best of 64 pictures of the target class, made as small"),
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
        """The step size at the start: `lr`, or what suits the step rule and where it begins."""
        return self.lr or (_LR_FROM_PICTURE if self.init == "image" else _DEFAULT_LR)[self.step_rule]

    def put(self, mask: Tensor) -> Put:
        """How a texture gets on images, given the pixels it covers: at a place of its own in every image."""
        size = mask.shape[0], mask.shape[1]

        def at_places(texture: Tensor, images: Tensor, generator: torch.Generator) -> Tensor:
            image_size = images.shape[-2], images.shape[-1]
            corners = self.corners(len(images), image_size, size, generator=generator)
            return paste(images, texture, mask, corners)

        return at_places

    def search(self, texture_search: TextureSearch, mask: Tensor) -> Candidate:
        """One search from one start, under the mask of these settings."""
        return search_under_mask(texture_search, mask, self.put(mask))

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
            DataError: no images to make it or to choose it on.
            TrainingError: the texture is no longer finite.
        """
        return fit_universal(self, model, images, labels, held_out=held_out, seed=seed, progress=progress)


@dataclass(frozen=True, kw_only=True)
class TextureSearch:
    """What one search, from one start, has to work with.

    Args:
        fields: the attack and its settings.
        model: to be attacked.
        images: (N, 3, H, W), those of the target class left out.
        labels: (N,).
        pictures: (M, 3, H, W), what `init=image` begins with: those of the target class, or all.
        judge: the held-out images.
        seed: of the whole attack.
        restart: number of this search.
        progress: told after every step.
    """

    fields: SearchFields
    model: Model
    images: Tensor
    labels: Tensor
    pictures: Tensor
    judge: HeldOut
    seed: int
    restart: int
    progress: Progress | None

    def stream(self, purpose: str) -> torch.Generator:
        """Random draws of this search for one purpose."""
        return generator(self.seed, self.fields.attack, purpose, self.restart)

    def loss(self, patched: Tensor, labels: Tensor) -> Tensor:
        """What is descended, averaged over a batch of patched images."""
        target = self.fields.target
        targets = None if target is None else torch.full_like(labels, target)
        return attack_loss(self.fields.loss, self.model(patched), labels, targets).mean()

    def score(self, put: Put, texture: Tensor) -> float:
        """Success rate on the held-out images."""
        # The same places for every texture of every restart, so that scores compare textures and not luck.
        places = generator(self.seed, self.fields.attack, "held-out places")
        return self.judge.success_rate(
            self.model, lambda images: put(texture, images, places), batch_size=self.fields.batch_size
        )

    def report(self, step: int, best: float) -> None:
        """Tells how far this search is."""
        if self.progress is not None:
            steps = self.fields.steps
            self.progress(self.restart * steps + step, self.fields.restarts * steps, f"held-out ASR {best:.1%}")

    def start_texture(self, size: tuple[int, int], put: Put) -> Tensor:
        """Texture (3, h, w) of this search's start, which `put` will put on images."""
        draws = self.stream("start")
        if self.fields.init != "image":
            return start_texture(self.fields.init, size, generator=draws).to(self.images.device)
        index = torch.randperm(len(self.images), generator=draws)[: self.fields.batch_size].to(self.images.device)
        images, labels = as_float(self.images[index]), self.labels[index]

        def loss(picture: Tensor) -> float:
            # The same places for every picture.
            return self.loss(put(picture, images, self.stream("start places")), labels).item()

        return best_picture(as_float(self.pictures), size, loss=loss, generator=draws)


def search_under_mask(
    texture_search: TextureSearch, mask: Tensor, put: Put, *, start: Tensor | None = None, steps_done: int = 0
) -> Candidate:
    """Searches the texture under a mask that stays as it is.

    Args:
        texture_search: what there is to work with.
        mask: boolean (h, w), on the device to compute on.
        put: how the texture gets on images.
        start: (3, h, w) in [0, 1]; None for the attack's own start.
        steps_done: how many of the task's steps are used up.

    Raises:
        TrainingError: the texture is no longer finite.
    """
    places = texture_search.stream("places")
    found = search_texture(
        texture_search.start_texture((mask.shape[0], mask.shape[1]), put) if start is None else start,
        texture_search.images,
        texture_search.labels,
        objective=lambda texture, images, labels: texture_search.loss(put(texture, images, places), labels),
        score=lambda texture: texture_search.score(put, texture),
        search=_search(texture_search.fields, steps=texture_search.fields.steps - steps_done),
        generator=texture_search.stream("batches"),
        report=lambda step, best: texture_search.report(steps_done + step, best),
    )
    return Candidate(texture=found.texture, mask=mask, score=found.score)


def fit_universal(
    fields: SearchFields,
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    held_out: tuple[Tensor, Tensor],
    seed: int,
    progress: Progress | None,
) -> Patch:
    """Makes a patch by `fields.search`, from every start; arguments and errors are those of the attack's `fit`."""
    mask = fields.mask((images.shape[-2], images.shape[-1])).to(images.device)
    judge = HeldOut.select(model, *held_out, target=fields.target, batch_size=fields.batch_size)
    pictures = images
    if fields.target is not None:
        others = labels != fields.target
        images, labels, pictures = images[others], labels[others], images[~others]
    if len(images) == 0:
        raise DataError("there are no images to make the patch on but those of the target class: give more images")
    if fields.init == "image" and len(pictures) == 0:
        raise DataError(f"there is no image of class {fields.target} to start from: give more images, or init=uniform")
    first = TextureSearch(
        fields=fields,
        model=model,
        images=images,
        labels=labels,
        pictures=pictures,
        judge=judge,
        seed=seed,
        restart=0,
        progress=progress,
    )
    tasks = (replace(first, fields=_begun(fields, restart), restart=restart) for restart in range(fields.restarts))
    best = max(
        (texture_search.fields.search(texture_search, mask) for texture_search in tasks),
        key=lambda candidate: candidate.score,
    )
    meta = {
        "attack": fields.attack,
        "settings": asdict(fields),
        "target": fields.target,
        "seed": seed,
        "threat_model": f"universal {'untargeted' if fields.target is None else 'targeted'}",
        "held_out_asr": best.score,
        "versions": versions(),
    }
    return Patch(texture=best.texture, mask=best.mask, place=fields.place, keep_out=fields.keep_out, meta=meta)


def _begun(fields: SearchFields, restart: int) -> SearchFields:
    """The settings of one restart: of those that begin at pictures every second one begins at noise.

    Networks that were trained on patches are blind to noise; on others its larger steps may come further.
    """
    return replace(fields, init="uniform") if fields.init == "image" and restart % 2 else fields


def _search(fields: SearchFields, *, steps: int) -> Search:
    return Search(
        steps=steps,
        batch_size=fields.batch_size,
        step_rule=fields.step_rule,
        lr=fields.step_size,
        cosine=fields.cosine,
        check_every=fields.check_every,
    )
