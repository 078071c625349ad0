"""The adaptive attack on a defense by double masking: a patch where the two-mask test fails.

A patch wins against Algorithm 1 of PatchCleanser if the masks that do not cover it agree on a wrong class, and each
mask that covers it, and so shows the right one, is contradicted by a second mask. Which masks are contradicted is known
from the image without a patch, because a mask over the patch hides it: the place is chosen by that, and only the
texture has to be searched. An image without such a place is attacked where the fewest masks stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qadtr_brevitas.attacks.geometry import paste
from qadtr_brevitas.attacks.per_image import PatchTask
from qadtr_brevitas.attacks.results import AttackGoal
from qadtr_brevitas.attacks.starts import start_patches
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.patch_size import PatchSize, PatchSizeLike
from qadtr_brevitas.evaluation.defended import DefendedModel
from qadtr_brevitas.evaluation.masked_predictor import MaskedPredictor
from qadtr_brevitas.evaluation.masks import covered_places
from qadtr_brevitas.evaluation.tta import averaged

_STEPS_BETWEEN_CHECKS = 10
"""Whether the defense is broken takes as many forward passes as there are masks."""


@dataclass(frozen=True)
class AdaptivePatches:
    """What the attack made.

    Args:
        images: (N, C, H, W) in [0, 1], patched.
        corners: (N, 2), row and column of each patch's upper left corner.
        standing: (N,), masks over the patch that no second mask contradicts; where there is one, and masks do not
            overlap, the defense can tell.
    """

    images: Tensor
    corners: Tensor
    standing: Tensor

    def unless(self, kept: Tensor, other: AdaptivePatches) -> AdaptivePatches:
        """Return the other's patches, but for images (N,) of which these are kept."""
        return AdaptivePatches(
            torch.where(kept[:, None, None, None], self.images, other.images),
            torch.where(kept[:, None], self.corners, other.corners),
            torch.where(kept, self.standing, other.standing),
        )


def adaptive_patches(
    network: DefendedModel,
    images: Tensor,
    labels: Tensor,
    *,
    size: PatchSizeLike | None = None,
    init: Literal["image", "uniform"] = "image",
    steps: int = 50,
    step_size: float = 0.05,
    masks_per_step: int = 6,
    restarts: int = 2,
    generator: torch.Generator,
) -> AdaptivePatches:
    """Patch each image where the two-mask test fails, with a texture that fools the masks that do not cover it.

    Of an image's patches the first that breaks its defended prediction is returned, or else the last one. Masks that
    overlap are looked at one by one, as if each stood for itself; whether a patch breaks the defense is asked of it.

    Args:
        network: a defended model under double masking, in eval mode, at the precision to attack, weights frozen.
        images: (N, C, H, W) in [0, 1], on the device of the network.
        labels: (N,), the true classes.
        size: of the patch; None for the size that is defended against.
        init: texture at the start: the best of some other images of the batch, shrunk to its size, or noise.
        steps: sign steps of the texture.
        step_size: in pixel values.
        masks_per_step: masks that a step averages over; each is one forward and backward pass of all images.
        restarts: searches, each at the next best place.
        generator: draws start and masks, on the CPU.

    Raises:
        UsageError: the defense is not double masking.
    """
    if network.certification.method != "double masking":
        raise UsageError(
            f"the attack looks for second masks, and {network.certification} has none: attack it with per-image patches"
        )
    patch = network.certification.size if size is None else PatchSize.parse(size)
    masks = network.certification.covering((images.shape[2], images.shape[3])).to(images.device)
    places = _weak_places(network, images, labels, masks, patch)
    made: AdaptivePatches | None = None
    broken = torch.zeros_like(labels, dtype=torch.bool)
    for restart in range(restarts):
        corners, uncovered, standing = places.choose(restart)
        seen = _Uncovered(network, images, corners, masks, uncovered, patch, masks_per_step, generator)
        start = start_patches(init, seen.task(labels), corners, generator=generator)
        for texture in _descended(seen, start, places.wrong_class(uncovered, labels), steps=steps, step_size=step_size):
            found = AdaptivePatches(seen.patched(texture), corners, standing)
            made = found if made is None else made.unless(broken, found)
            left = ~broken
            broken[left] = _defended(network, made.images[left]) != labels[left]
            if broken.all():
                return made
    assert made is not None
    return made


@dataclass(frozen=True)
class _WeakPlaces:
    """Places of a patch, the best for an attack first.

    Args:
        corners: (kinds, 2), one place of each kind; places are of one kind if the same masks cover a patch there.
        covering: boolean (kinds, M), those masks.
        standing: (N, kinds), how many of them no second mask contradicts.
        under_pairs: (N, M, M), classes of the image under every two masks.
    """

    corners: Tensor
    covering: Tensor
    standing: Tensor
    under_pairs: Tensor

    def choose(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return corners (N, 2), which masks do not cover a patch there (N, M), and how many over it stand (N,)."""
        # Of equally good places that under the fewest masks: the patch is seen by more.
        score = self.standing * (self.covering.shape[1] + 1) + self.covering.sum(dim=1)
        chosen = score.argsort(dim=1, stable=True)[:, min(rank, len(self.corners) - 1)]
        return self.corners[chosen], ~self.covering[chosen], self.standing.gather(1, chosen[:, None])[:, 0]

    def wrong_class(self, uncovered: Tensor, labels: Tensor) -> Tensor:
        """(N,) the wrong class that masks over the patch show most often beside a second one; else any other."""
        classes = int(max(int(self.under_pairs.max()), int(labels.max()), 1)) + 1
        votes = torch.zeros(len(labels), classes, device=labels.device)
        votes.scatter_add_(
            1, self.under_pairs.flatten(1), (~uncovered)[:, :, None].expand_as(self.under_pairs).flatten(1).float()
        )
        everywhere = torch.zeros_like(votes).scatter_add_(
            1, self.under_pairs.flatten(1), torch.ones_like(votes[:, :1]).expand(-1, self.under_pairs[0].numel())
        )
        # Classes that only other masks show come after those.
        votes = votes + everywhere / (1 + everywhere.sum(dim=1, keepdim=True))
        return votes.scatter(1, labels[:, None], -1.0).argmax(dim=1)


def _weak_places(
    network: DefendedModel, images: Tensor, labels: Tensor, masks: Tensor, patch: PatchSize
) -> _WeakPlaces:
    model = averaged(network.model, network.certification.tta)
    predictor = MaskedPredictor(model, images, masks, network.fill.to(images.device), network.batch_size)
    places = covered_places(masks, patch)
    kinds, number = places.flatten(0, 1).unique(dim=0, return_inverse=True)
    corners = torch.stack([_middle(number == kind, places.shape[1]) for kind in range(len(kinds))])
    # A mask stands if it shows the right class beside every second mask, itself among them.
    under_pairs = _classes_under_pairs(predictor)
    stands = (under_pairs == labels[:, None, None]).all(dim=2)
    return _WeakPlaces(corners, kinds, (stands[:, None] & kinds).sum(dim=2), under_pairs)


@dataclass(frozen=True)
class _Uncovered:
    """What a network sees of patched images under masks that do not cover the patch.

    Args:
        network: the defended model.
        images: (N, C, H, W) in [0, 1].
        corners: (N, 2) where the patches lie.
        masks: boolean (M, H, W), all masks.
        uncovered: boolean (N, M), which of the masks do not cover them.
        size: of the patches.
        count: masks that are drawn for each image.
        generator: draws them.
    """

    network: DefendedModel
    images: Tensor
    corners: Tensor
    masks: Tensor
    uncovered: Tensor
    size: PatchSize
    count: int
    generator: torch.Generator

    def task(self, labels: Tensor) -> PatchTask:
        """Return what a search for patches starts with: to mislead some masks, the same for all patches it tries."""
        drawn, shape = self.draw(), torch.ones(self.size.height, self.size.width, dtype=torch.bool)
        goal = AttackGoal.of(None, labels, loss="margin")
        return PatchTask(
            model=lambda images: self.under(images, drawn).mean(dim=0),
            images=self.images,
            mask=shape.to(self.images.device),
            goal=goal,
        )

    def patched(self, texture: Tensor) -> Tensor:
        """Return the images with textures (N, C, h, w)."""
        shape = torch.ones(self.size.height, self.size.width, dtype=torch.bool, device=texture.device)
        return paste(self.images, texture, shape, self.corners)

    def draw(self) -> Tensor:
        """Return numbers of masks, (N, count)."""
        weights = self.uncovered.float().cpu().clamp(min=1e-9)
        return torch.multinomial(weights, self.count, replacement=True, generator=self.generator).to(self.images.device)

    def under(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return the logits (count, N, classes) of patched images under masks drawn; gradients reach the images."""
        model, fill = averaged(self.network.model, self.network.certification.tta), self.network.fill
        fill = fill.to(images.device)
        return torch.stack([model(fill.cover(images, self.masks[numbers][:, None])) for numbers in drawn.unbind(dim=1)])


def _descended(seen: _Uncovered, texture: Tensor, target: Tensor, *, steps: int, step_size: float) -> Iterator[Tensor]:
    """Yield the texture after every tenth sign step towards a class (N,), and after the last."""
    for step in range(1, steps + 1):
        texture.requires_grad_()
        logits = seen.under(seen.patched(texture), seen.draw())
        loss = cross_entropy(logits.flatten(0, 1), target.repeat(len(logits)), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, texture)
        texture = (texture.detach() - step_size * gradient.sign()).clamp(0, 1)
        if step % _STEPS_BETWEEN_CHECKS == 0 or step == steps:
            yield texture


@torch.no_grad()
def _defended(network: DefendedModel, images: Tensor) -> Tensor:
    """(N,) defended predictions, on the device of the images."""
    return network.decide(images, prove=False).defended.to(images.device)


def _classes_under_pairs(predictor: MaskedPredictor) -> Tensor:
    """(N, M, M) classes under every two masks; a pair is seen once."""
    count, masks = len(predictor.images), len(predictor.masks)
    device = predictor.images.device
    first, second = torch.triu_indices(masks, masks, device=device)
    images = torch.arange(count, device=device).repeat_interleave(len(first))
    found = predictor.under(images, first.repeat(count), second.repeat(count)).view(count, -1)
    classes = found.new_empty(count, masks, masks)
    classes[:, first, second] = found
    classes[:, second, first] = found
    return classes


def _middle(which: Tensor, width: int) -> Tensor:
    """(2,) row and column of the middle one of some places in reading order."""
    found = which.nonzero()[:, 0]
    place = found[len(found) // 2]
    return torch.stack([place // width, place % width])
