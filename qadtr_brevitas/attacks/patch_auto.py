"""PatchAuto: a parameter-free ensemble of patch searches, one after the other on what the others left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import IndexedAttack, Model, Passes, TargetedAttack
from qadtr_brevitas.attacks.image_streams import ImageStreams
from qadtr_brevitas.attacks.losses import AttackLoss
from qadtr_brevitas.attacks.patch_settings import Index, PatchSettings
from qadtr_brevitas.attacks.per_image import PatchTask
from qadtr_brevitas.attacks.place_scan import best_corners, first_order_gains
from qadtr_brevitas.attacks.plateau_search import PlateauSearch
from qadtr_brevitas.attacks.relocation import AllowedCorners
from qadtr_brevitas.attacks.results import AttackGoal, AttackResult
from qadtr_brevitas.attacks.sparse_rs import RandomSearch
from qadtr_brevitas.attacks.starts import shrunk
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import Precision

_PICTURES_TRIED = 8


@dataclass(frozen=True, kw_only=True)
class GradientPart:
    """One search by gradient.

    Args:
        loss: what it descends.
        start: noise, or the best of some pictures of other classes.
        place: rank among the places where the gradient in the image promises most; None for a random place.
        steps: gradient steps.
    """

    loss: AttackLoss
    start: Literal["noise", "picture"]
    place: int | None
    steps: int


@dataclass(frozen=True, kw_only=True)
class RandomPart:
    """One search by Sparse-RS, which uses outputs only.

    Args:
        queries: forward passes for an image, at most.
    """

    queries: int


Part = GradientPart | RandomPart

VERSIONS: dict[str, tuple[Part, ...]] = {
    "fast": (
        GradientPart(loss="margin", start="noise", place=0, steps=40),
        GradientPart(loss="dlr", start="picture", place=1, steps=40),
        GradientPart(loss="cross-entropy", start="noise", place=None, steps=20),
        RandomPart(queries=200),
    ),
    "standard": (
        GradientPart(loss="margin", start="noise", place=0, steps=100),
        GradientPart(loss="dlr", start="picture", place=1, steps=100),
        GradientPart(loss="cross-entropy", start="noise", place=None, steps=100),
        GradientPart(loss="margin", start="picture", place=None, steps=100),
        GradientPart(loss="cross-entropy", start="picture", place=2, steps=100),
        GradientPart(loss="margin", start="noise", place=None, steps=100),
        RandomPart(queries=2000),
    ),
}


@plugin
class PatchAuto(PatchSettings, IndexedAttack, TargetedAttack):
    """Ensemble of searches for a patch per image, with nothing to tune; for patches what AutoAttack is for pixels.

    Its parts run one after the other, each on the images that withstood those before: searches by gradient with
    momentum and steps that are halved on plateaus (APGD, Croce & Hein 2020), of the margin, the difference of logits
    ratio and the cross-entropy, from noise and from pictures of other classes, at the places where the gradient in the
    image promises most and at random ones; then Sparse-RS (Croce et al. 2022), which needs no gradients. Patches move
    while they are searched. Images that are classified wrongly without a patch are returned unchanged.

    `fast` has three searches by gradient and 200 queries of Sparse-RS, `standard` six longer ones and 2,000 queries;
    `passes` has the number of passes at most. What an image gets depends on the seed and on its index, not on the
    others in its batch; only without `pictures` do the images of the batch serve as pictures for each other.

    Gradients pass straight through the quantizers of the precision that is attacked. Those of a higher precision are no
    better guide: on a CIFAR ResNet-20 that was calibrated at 4 bit, one search of 30 steps breaks 95.8 % of 96 images
    with its own gradients and 91.7 % with those at 8 bit.

    Searches end as soon as an image is broken, so that its images transfer less well than those of a search that goes
    on. A network that is random at inference is attacked through its mean (`--eot`).
    """

    target: Annotated[Index | None, Field(description="class to be predicted instead; null: any wrong one")] = None
    version: Annotated[Literal["fast", "standard"], Field(description="set of searches")] = "standard"

    @property
    def parts(self) -> Sequence[Part]:
        """The searches, in their order."""
        return VERSIONS[self.version]

    @property
    def passes(self) -> Passes:
        """Forward and backward passes for an image, at most."""
        return sum((_passes(part, moves=self.place == "random") for part in self.parts), start=Passes(1, 1))

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
        indices: Sequence[int] | None = None,
        pictures: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return patched images, each with a patch of its own. The model's parameters receive no gradients.

        Args:
            model: in evaluation mode, at the precision to attack.
            images: (N, C, H, W) in [0, 1].
            labels: (N,), the true classes.
            generator: gives the seed of all draws.
            precision: not used; patches have 8 bit.
            indices: numbers of the images in their data set; None for 0, 1, 2, ...
            pictures: images and labels to start from; None for the images themselves.

        Returns:
            (N, C, H, W) in [0, 1]; pixels outside the masks are those of the images.

        Raises:
            UsageError: the patch does not fit on the images or beside the box, or the model has no class `target`.
        """
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        mask = self.mask((images.shape[-2], images.shape[-1])).to(images.device)
        goal = AttackGoal.of(self.target, labels, loss="margin")
        task = PatchTask(model=model, images=images, mask=mask, goal=goal)
        ensemble = Ensemble(
            parts=self.parts,
            task=task,
            places=self._places(task),
            moves=self.place == "random",
            streams=ImageStreams.of(seed, indices or range(len(images)), device=images.device),
            pictures=pictures or (images, labels),
        )
        return ensemble.run().images

    def _places(self, task: PatchTask) -> AllowedCorners:
        """Return where patches may lie."""
        if self.place == "random":
            return AllowedCorners.outside(self.keep_out, task.image_size, task.patch_size)
        return AllowedCorners.only(self.place, task.image_size, task.patch_size)


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The searches of one batch of images.

    Args:
        parts: the searches, in their order.
        task: the images and the goal of the attack, with the margin as its loss.
        places: where patches may lie, or a place (N, 2) for each image.
        moves: whether patches move while they are searched; not at places that are given.
        streams: draw for each image.
        pictures: images (K, C, H, W) and labels (K,) to start from.
    """

    parts: Sequence[Part]
    task: PatchTask
    places: AllowedCorners | Tensor
    moves: bool
    streams: ImageStreams
    pictures: tuple[Tensor, Tensor]

    def run(self) -> AttackResult:
        """Return the best result for every image."""
        gains, best = first_order_gains(self.task)
        for number, part in enumerate(self.parts):
            left = (~best.success).nonzero().squeeze(1)
            if len(left) == 0:
                break
            found = self._subset(left).search(part, gains[left], number)
            # All images together, as they will be scored: at few bits rounding depends on the batch, and an image that
            # is hardly broken may be whole in another one.
            best = self.task.judge(best.images.index_copy(0, left, found.images)).or_better(best)
        return best

    def search(self, part: Part, gains: Tensor, number: int) -> AttackResult:
        """Return the result of one part by itself.

        Args:
            part: the search.
            gains: (N, rows, columns), what each place promises.
            number: of the part, which decides its draws.
        """
        streams = self.streams.branch(number)
        if isinstance(part, RandomPart):
            return self._random_search(part, streams).run()
        task = self.task.with_loss(part.loss)
        corners = self._corners(part, gains, streams.branch(0))
        patches = self._start(part, task, corners, streams.branch(1))
        search = PlateauSearch(task=task, allowed=self._room, steps=part.steps, streams=streams.branch(2))
        return search.run(patches, corners)

    def _subset(self, left: Tensor) -> Ensemble:
        """Return the searches of some of the images."""
        places = self.places[left] if isinstance(self.places, Tensor) else self.places
        return replace(self, task=self.task.subset(left), places=places, streams=self.streams.subset(left))

    @property
    def _room(self) -> AllowedCorners | None:
        """Where patches may move; None where they stay."""
        return self.places if self.moves and isinstance(self.places, AllowedCorners) else None

    def _corners(self, part: GradientPart, gains: Tensor, streams: ImageStreams) -> Tensor:
        if isinstance(self.places, Tensor) or part.place is None:
            return self._any_corners(streams)
        apart = max(1, self.task.patch_size[0] // 2), max(1, self.task.patch_size[1] // 2)
        return best_corners(gains, part.place + 1, allowed=self.places, apart=apart)[-1]

    def _any_corners(self, streams: ImageStreams) -> Tensor:
        return self.places if isinstance(self.places, Tensor) else self.places.draw(streams, len(self.task.images))

    @torch.no_grad()
    def _start(self, part: GradientPart, task: PatchTask, corners: Tensor, streams: ImageStreams) -> Tensor:
        """Return patches (N, C, h, w) of noise, or the pictures of other classes with the lowest loss."""
        count, size = len(task.images), task.patch_size
        patches = streams.uniform(count, task.channels, *size)
        if part.start == "noise":
            return patches
        pictures, classes = self.pictures
        pictures, labels, targets = shrunk(pictures, size), task.goal.labels, task.goal.targets
        lowest = torch.full_like(labels, torch.inf, dtype=pictures.dtype)
        for _ in range(_PICTURES_TRIED):
            drawn = streams.integers(0, len(pictures), count)
            losses = task.assess(pictures[drawn], corners).losses
            fits = classes[drawn] != labels if targets is None else classes[drawn] == targets
            better = fits & (losses < lowest)
            patches = torch.where(better[:, None, None, None], pictures[drawn], patches)
            lowest = torch.where(better, losses, lowest)
        return patches

    def _random_search(self, part: RandomPart, streams: ImageStreams) -> RandomSearch:
        targeted, starts = self.task.goal.targets is not None, streams.branch(0)
        return RandomSearch(
            task=self.task.with_loss("cross-entropy") if targeted else self.task,
            draw_corners=lambda: self._any_corners(starts),
            allowed_corners=self._room,
            queries=part.queries,
            alpha=0.1 if targeted else 0.4,
            move_every=10 if targeted else 4,
            draws=streams.branch(1),
        )


def _passes(part: Part, *, moves: bool) -> Passes:
    if isinstance(part, RandomPart):
        return Passes(part.queries + 1, 0)
    pictures = _PICTURES_TRIED if part.start == "picture" else 0
    return PlateauSearch.passes(part.steps, moves=moves) + Passes(pictures + 1, 0)
