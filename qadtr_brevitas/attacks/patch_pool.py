"""A pool of universal patches that training keeps from step to step and improves a few gradient steps at a time.

A patch of an image's own gets a handful of steps, and a network learns to ignore what these make of it. What breaks
such a network is a patch that was optimized for hundreds of steps on many images, which costs too much to repeat in
each training step. So the patches of the pool continue where the last training step left them (after Shafahi et al.
2020, "Universal Adversarial Training", for perturbations of whole images). Each training process keeps a pool of its
own and improves it on its part of the batch: with more processes the patches stay as strong if the batch grows too.

Other rules make it the pool of Meta Adversarial Training (MAT, Metzen et al. 2021, arXiv 2101.11453).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qadtr_brevitas.attacks.base import Memory, Model
from qadtr_brevitas.attacks.descent import ApplyStep, StepRule, Variable, descend
from qadtr_brevitas.attacks.fake_quantize import fake_quantize
from qadtr_brevitas.attacks.geometry import paste, random_corners
from qadtr_brevitas.attacks.starts import shrunk

PoolTargets: TypeAlias = Literal["pictures", "turns"]
StepSizes: TypeAlias = Literal["equal", "drawn"]

_IMAGES_EACH = 16
"""Images that share a patch in a training step: the gradient of one image finds what fools that image only."""

_STEP = 0.04
"""Root mean square of the change of a patch's pixels in one step."""

_LARGEST = 2.0
"""Bound of a pixel's change, in such steps."""

_DRAWN_STEPS = (1e-4, 0.1)
"""Smallest and largest sign step, in pixel values, of `step_sizes: drawn` (MAT)."""


@dataclass(frozen=True, kw_only=True)
class PoolRules:
    """How a pool of patches is kept; every patch begins as a picture of the batch, shrunk.

    Args:
        side: side of the patches in the pool, in pixels; in the images they have the size of the batch's mask.
        size: patches in the pool.
        targets: what a patch aims at: the class of its picture, or the classes in turn over the pool.
        step_sizes: normalized steps of one size, or sign steps whose size is drawn for each patch, log-uniformly from
            1e-4 to 0.1.
        worst_of: pairs of a patch and a place that are tried for each image, of which that of highest loss lies on it;
            1: no search, 16 images share a patch at places that are drawn anew for each gradient step.
        write_back: weight with which improved patches replace those in the pool (Reptile's step size).
        renewed: probability that a patch begins anew when its turn comes; 0.05 gives it 20 turns on average.
    """

    side: int
    size: int = 40
    targets: PoolTargets = "pictures"
    step_sizes: StepSizes = "equal"
    worst_of: int = 1
    write_back: float = 1.0
    renewed: float = 0.05


@dataclass(frozen=True)
class NormalizedSteps(StepRule):
    """Gradient steps of the same length for every patch, whatever the size of its gradient.

    Not sign steps, which make noise of a picture.
    """

    def bind(self, values: Tensor) -> ApplyStep:
        def apply(gradient: Tensor, step: int) -> None:
            length = gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=torch.finfo(gradient.dtype).tiny)
            values.sub_(_STEP * (gradient / length).clamp(-_LARGEST, _LARGEST))

        return apply


@dataclass(frozen=True, eq=False)
class SignSteps(StepRule):
    """Sign steps of a size of its own for every patch.

    Args:
        sizes: (N,) in pixel values.
    """

    sizes: Tensor

    def bind(self, values: Tensor) -> ApplyStep:
        def apply(gradient: Tensor, step: int) -> None:
            values.sub_(self.sizes[:, None, None, None] * gradient.sign())

        return apply


def pool_patches(
    batch: PatchedBatch,
    model: Model,
    labels: Tensor,
    memory: Memory,
    *,
    rules: PoolRules,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Return the images under some patches of the pool, which are improved first.

    Patches descend the cross-entropy to their class, averaged over their images and places.

    Args:
        batch: the images, and how patches are drawn into them.
        model: the model under attack.
        labels: (N,), the true classes.
        memory: the pool: `textures` (K, C, side, side) in [0, 1], `targets` (K,), -1 where a patch has not started, and
            `steps` (K,), the size of each patch's steps if they are drawn. Filled if it is empty, and changed in place.
        rules: how the pool is kept.
        steps: gradient steps.
        generator: draws patches and places.

    Returns:
        (N, C, H, W) in [0, 1].

    Raises:
        UsageError: the patches are larger than the images.
    """
    _fill(memory, rules, model, batch.images, generator=generator)
    corners: Tensor | None = None
    if rules.worst_of > 1:
        chosen, corners = worst_pairs(batch, model, labels, memory, rules, generator=generator)
        turns, patch_of_image = chosen.unique(return_inverse=True)
    else:
        turns, patch_of_image = _take_turns(batch, labels, memory, rules, generator=generator)
    targets = memory["targets"][turns][patch_of_image]
    # An image of the target class itself tells nothing.
    counts = targets != labels

    def patched(textures: Tensor) -> Tensor:
        patches = shrunk(textures, batch.patch_size)[patch_of_image]
        return batch.with_patches(patches, batch.draw_corners(generator) if corners is None else corners)

    def losses(textures: Tensor) -> Tensor:
        return cross_entropy(model(patched(textures)), targets, reduction="none") * counts

    rule = SignSteps(memory["steps"][turns]) if rules.step_sizes == "drawn" else NormalizedSteps()
    before = memory["textures"][turns]
    (textures,) = descend([Variable(before, rule)], losses, steps=steps)
    memory["textures"][turns] = before.lerp(textures, rules.write_back)
    with torch.no_grad():
        return patched(textures)


def worst_starts(
    batch: PatchedBatch,
    model: Model,
    labels: Tensor,
    memory: Memory,
    *,
    rules: PoolRules,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return a patch (N, C, h, w) in [0, 1] and a place (N, 2) for each image: those of `worst_pairs`.

    The arguments are those of `pool_patches`; the pool is filled if it is empty.
    """
    _fill(memory, rules, model, batch.images, generator=generator)
    chosen, corners = worst_pairs(batch, model, labels, memory, rules, generator=generator)
    return shrunk(memory["textures"][chosen], batch.patch_size), corners


@torch.no_grad()
def worst_pairs(
    batch: PatchedBatch,
    model: Model,
    labels: Tensor,
    memory: Memory,
    rules: PoolRules,
    *,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return the patch (N,), by its number, and the place (N, 2) of highest loss for each image.

    Each try of the `rules.worst_of` costs a forward pass; the loss is the cross-entropy to the true class.

    Args:
        batch: the images, and how patches are drawn into them.
        model: the model under attack.
        labels: (N,), the true classes.
        memory: the pool; patches that have not started begin.
        rules: how the pool is kept.
        generator: draws patches and places.
    """
    device, count = labels.device, len(labels)
    chosen = torch.zeros(count, dtype=torch.int64, device=device)
    corners = torch.zeros(count, 2, dtype=torch.int64, device=device)
    highest = torch.full((count,), -torch.inf, device=device)
    for _ in range(rules.worst_of):
        tried = torch.randint(rules.size, (count,), generator=generator, device=generator.device).to(device)
        places = batch.draw_corners(generator).to(device)
        _start_new_patches(memory, tried.unique(), batch.images, labels, rules, generator=generator)
        images = batch.with_patches(shrunk(memory["textures"][tried], batch.patch_size), places)
        losses = cross_entropy(model(images).float(), labels, reduction="none")
        worse = losses > highest
        highest = torch.where(worse, losses, highest)
        chosen = torch.where(worse, tried, chosen)
        corners = torch.where(worse[:, None], places, corners)
    return chosen, corners


def _take_turns(
    batch: PatchedBatch, labels: Tensor, memory: Memory, rules: PoolRules, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the numbers of the patches whose turn it is, (P,), and which of them each image has, (N,)."""
    device, count = labels.device, len(labels)
    turns = torch.randperm(rules.size, generator=generator, device=generator.device).to(device)
    turns = turns[: min(rules.size, max(1, count // _IMAGES_EACH))]
    _start_new_patches(memory, turns, batch.images, labels, rules, generator=generator)
    return turns, torch.arange(count, device=device) % len(turns)


def _fill(memory: Memory, rules: PoolRules, model: Model, images: Tensor, *, generator: torch.Generator) -> None:
    """Make the pool of patches that have not started, unless there is one."""
    if memory:
        return
    device = images.device
    memory["textures"] = torch.zeros(rules.size, images.shape[1], rules.side, rules.side, device=device)
    memory["targets"] = torch.full((rules.size,), -1, device=device)
    if rules.targets == "turns":
        with torch.no_grad():
            memory["classes"] = torch.tensor(model(images[:1]).shape[1], device=device)
    if rules.step_sizes == "drawn":
        low, high = (torch.tensor(size).log() for size in _DRAWN_STEPS)
        draws = torch.rand(rules.size, generator=generator, device=generator.device).to(device)
        memory["steps"] = (low + draws * (high - low)).exp()


def _start_new_patches(
    memory: Memory,
    turns: Tensor,
    pictures: Tensor,
    labels: Tensor,
    rules: PoolRules,
    *,
    generator: torch.Generator,
) -> None:
    """Replace those patches among `turns` (their numbers) that have not started, and a few others, by pictures."""
    textures, targets = memory["textures"], memory["targets"]
    draws = torch.rand(2, len(turns), generator=generator, device=generator.device).to(labels.device)
    replaced = (targets[turns] < 0) | (draws[0] < rules.renewed)
    drawn = (draws[1] * len(labels)).long()[replaced]
    begun = turns[replaced]
    textures[begun] = shrunk(pictures[drawn], (textures.shape[-2], textures.shape[-1]))
    targets[begun] = begun % memory["classes"] if rules.targets == "turns" else labels[drawn]


@dataclass(frozen=True, kw_only=True)
class PatchedBatch:
    """Images as a quantized network sees them, and what all patches on them have in common (QADT-R, eq. 1).

    Args:
        images: (N, C, H, W) in [0, 1].
        background: the same images as they are around the patches, quantized or not.
        mask: boolean (h, w) of the pixels a patch covers.
        bits: bit-width of the patches.
        step_error: relative error of their quantizer's step.
    """

    images: Tensor
    background: Tensor
    mask: Tensor
    bits: int
    step_error: float

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of the patches."""
        return self.mask.shape[0], self.mask.shape[1]

    def draw_corners(self, generator: torch.Generator) -> Tensor:
        """Draw a place (N, 2), row and column in pixels, for each image's patch.

        Raises:
            UsageError: the patches are larger than the images.
        """
        image_size = self.images.shape[-2], self.images.shape[-1]
        return random_corners(len(self.images), image_size, self.patch_size, generator=generator)

    def with_patches(self, patches: Tensor, corners: Tensor) -> Tensor:
        """Return images (N, C, H, W) with the patches (N, C, h, w), quantized, at corners (N, 2)."""
        quantized = fake_quantize(patches, self.bits, step_error=self.step_error)
        return paste(self.background, quantized, self.mask, corners)
