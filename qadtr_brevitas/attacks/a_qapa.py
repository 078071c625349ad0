"""A-QAPA: patches made inside the quantized network, from quantized pixels, for training and as an attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import model_validator
from torch import Tensor

from qadtr_brevitas.attacks.base import IterativeAttack, Memory, Model, RememberingAttack, TargetedAttack
from qadtr_brevitas.attacks.descent import OptimizerSteps, Variable, descend
from qadtr_brevitas.attacks.fake_quantize import fake_quantize
from qadtr_brevitas.attacks.patch_pool import (
    PatchedBatch,
    PoolRules,
    PoolTargets,
    StepSizes,
    pool_patches,
    worst_starts,
)
from qadtr_brevitas.attacks.per_image import search_patches
from qadtr_brevitas.attacks.results import AttackGoal, AttackResult
from qadtr_brevitas.attacks.shapes import shape_mask
from qadtr_brevitas.attacks.starts import shrunk
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import DEFAULT_BITS, FLOAT_BITS, MAX_BITS, MIN_BITS, Precision

_FIRST_LAYER_BITS = 8
_SIDES = (6 / 32, 8 / 32, 10 / 32)
"""Default sides of the patches, as shares of the image's side."""

Choice = TypeVar("Choice")
Bits = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)] | Literal[32]


@plugin
class AQapa(RememberingAttack, TargetedAttack, IterativeAttack):
    """Adaptive quantization-aware patches (QADT-R, eq. 1): x_adv = Q_b(x) (1 - M) + Q_b(p) M.

    A fresh patch per image, at a place of its own, is optimized by sign steps inside the network at its current
    precision: a float master patch is rounded in the forward pass and the gradient goes straight through. One size,
    one shape and one patch bit-width are drawn per batch.

    What the paper leaves open, and what is done here:

    - Eq. (1) quantizes the whole image, the text only "the adversarial region". Default: the equation.
      `quantize_image=false` is the text; then nothing but masked pixels changes.
    - b is the network's activation bit-width; `patch_bits` gives the patch one of its own, fixed or drawn from
      {32, 8, 5, 4, 2}. At 32 bit neither image nor patch is quantized.
    - sigma_b = 0.01 ("variance of bit-width switching noise", Table 17) is in no equation. `noise` is read as the
      standard deviation of a relative error of the quantizer's step, drawn per batch and quantizer. Default: off.
      Literally, as a variance, it would be noise=0.1.
    - Steps, sizes, shapes, attacked share and target in training are not given. As in PBAT (Rao et al. 2020) half of
      each batch is attacked, with steps of 0.1 against the true class; 5 of its 25 steps, because 8x8 patches
      on a float CIFAR ResNet-20 then already leave about 22 % accuracy (10 steps 13 %, noise 80 %).
      `targeted=true` aims at a random other class of each image instead, `target` at a given one.
    - The equation does not say whether there is one patch p, or one for each image. Default: one for each image.
      `universal=0.5` gives half of the attacked images universal patches (`patch_pool.py`), which a few steps for each
      image by itself never come near: LAVAN does a third less to a network trained so, at the same cost
      (docs/results/resistance.md). `init=pool` lets the other patches begin with them. The keys `pool_*` make their
      pool that of Meta Adversarial Training (MAT, Metzen et al. 2021, arXiv 2101.11453): 1,000 patches, targets in turn
      over the classes, a sign step drawn for each patch, for each image the worst of 5 pairs of a patch and a place,
      and a write-back of 0.25. MAT patches every image.

    To evaluate with it, give `quantize_image=false`: what the rounding of the image breaks would else count as broken
    by patches. Give also what training does not pay for: `keep_best=true` (one more forward pass), which returns the
    best iterate of every image instead of the last, over `restarts` that each draw size, shape and places anew;
    `patch_bits=8`, which keeps patches on the grid of 8-bit images; and more and smaller steps, as `steps=50
    step_size=0.05`.
    """

    share: Annotated[float, Field(gt=0, le=1, description="share of each training batch that is attacked")] = 0.5
    steps: Annotated[int, Field(ge=0, description="sign steps per patch; 0: noise")] = 5
    step_size: Annotated[float, Field(gt=0, le=1, description="step in pixel values")] = 0.1
    sizes: Annotated[
        Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None,
        Field(description="sides or diameters in pixels; null: 6, 8 and 10 on images of 32, larger on larger ones"),
    ] = None
    shapes: Annotated[tuple[Literal["square", "disc"], ...], Field(min_length=1, description="shapes to draw from")] = (
        "square",
        "disc",
    )
    patch_bits: Annotated[
        Literal["same", "random"] | Bits, Field(description="bit-width of the patch; same: the network's activations'")
    ] = "same"
    quantize_image: Annotated[bool, Field(description="quantize the clean pixels too, as eq. (1) says")] = True
    noise: Annotated[float, Field(ge=0, le=0.1, description="relative error of the quantizers' steps, std")] = 0.0
    init: Annotated[
        Literal["uniform", "image", "mixed", "pool"],
        Field(
            description="patches at the start: noise, other images of the batch, shrunk, either at random, or in "
            "training with `universal` the worst of `pool_worst_of` pairs of a universal patch and a place"
        ),
    ] = "uniform"
    universal: Annotated[
        float,
        Field(ge=0, le=1, description="share of the attacked images under universal patches, kept over the training"),
    ] = 0.0
    pool_size: Annotated[int, Field(ge=1, description="universal patches that are kept")] = 40
    pool_targets: Annotated[
        PoolTargets, Field(description="what they aim at: the class of the picture they begin as, or classes in turn")
    ] = "pictures"
    pool_step_sizes: Annotated[
        StepSizes, Field(description="equal: normalized steps; drawn: sign steps of 1e-4 to 0.1, drawn for each patch")
    ] = "equal"
    pool_worst_of: Annotated[
        int, Field(ge=1, description="pairs of patch and place tried for each image, a forward pass each; 1: no search")
    ] = 1
    pool_write_back: Annotated[
        float, Field(gt=0, le=1, description="weight of improved patches when they go back into the pool")
    ] = 1.0
    pool_renewed: Annotated[
        float, Field(ge=0, le=1, description="probability that a patch begins anew when its turn comes")
    ] = 0.05
    targeted: Annotated[bool, Field(description="aim at a random other class instead of any")] = False
    target: Annotated[int | None, Field(ge=0, description="class to be predicted instead; null: see targeted")] = None
    keep_best: Annotated[bool, Field(description="return every image's best iterate instead of the last")] = False
    restarts: Annotated[int, Field(ge=1, description="independent runs, of which the best is kept")] = 1

    @model_validator(mode="after")
    def _one_aim(self) -> AQapa:
        if self.targeted and self.target is not None:
            raise ValueError("targeted draws the target class and target fixes it: give only one of them")
        if self.universal and (self.keep_best or self.targeted or self.target is not None):
            raise ValueError(
                "universal patches have targets of their own and cannot keep the best iterate: leave out target, "
                "targeted and keep_best, or give universal=0"
            )
        if self.init == "pool" and not self.universal:
            raise ValueError("init=pool begins with universal patches: give universal a share above 0, or another init")
        if self.restarts > 1 and not self.keep_best:
            raise ValueError(f"restarts={self.restarts} needs keep_best=true: the best of the restarts is returned")
        return self

    @property
    def remembers(self) -> bool:
        """Whether training has to keep universal patches from step to step."""
        return self.universal > 0

    @property
    def not_scored(self) -> str | None:
        """Why an evaluation cannot score these images; None if it can."""
        if not self.quantize_image:
            return None
        return (
            "a-qapa rounds the whole image to the network's bits (quantize_image), so images that the rounding breaks "
            "would count as broken by patches: give --attack '{name: a-qapa, quantize_image: false}'"
        )

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Return patched versions of all images. The model's parameters receive no gradients.

        Args:
            model: in evaluation mode, at `precision`.
            images: (N, C, H, W) in [0, 1].
            labels: (N,), the true classes.
            generator: draws sizes, shapes, places, bit-widths and starts.
            precision: precision the model runs at; None means not quantized.
            memory: keeps universal patches over the training; changed in place.

        Returns:
            (N, C, H, W) in [0, 1]; outside the masks equal to the images, quantized if `quantize_image`.

        Raises:
            UsageError: a size is larger than the images, the model has no class `target`, or `universal` is not 0 and
                there is no memory.
        """
        if self.universal and memory is None:
            raise UsageError(
                f"a-qapa universal={self.universal:g} works only in training, which keeps its patches: "
                "give universal=0, or make universal patches with lavan"
            )
        count = round(len(images) * self.universal)
        if memory is None or count == 0:
            return self._patch_each(model, images, labels, generator=generator, precision=precision, memory=memory)

        batch = self._batch(images[:count], generator, precision)
        rules = self._pool_rules(images)
        pooled = pool_patches(batch, model, labels[:count], memory, rules=rules, steps=self.steps, generator=generator)
        if count == len(images):
            return pooled
        rest = self._patch_each(
            model, images[count:], labels[count:], generator=generator, precision=precision, memory=memory
        )
        return torch.cat([pooled, rest])

    def _pool_rules(self, images: Tensor) -> PoolRules:
        return PoolRules(
            side=max(self._sides(images)),
            size=self.pool_size,
            targets=self.pool_targets,
            step_sizes=self.pool_step_sizes,
            worst_of=self.pool_worst_of,
            write_back=self.pool_write_back,
            renewed=self.pool_renewed,
        )

    def _patch_each(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Return the images, each under a patch of its own."""
        rule = OptimizerSteps(steps=self.steps, step_rule="sign", lr=self.step_size)

        def start() -> _Start:
            return self._start(model, images, labels, generator=generator, precision=precision, memory=memory)

        if self.keep_best:
            starts = (start() for _ in range(self.restarts))
            results = (search_patches(s.assess, s.patches, s.corners, rule=rule, steps=self.steps) for s in starts)
            # Of equal results the later one is kept, as within a search.
            return reduce(lambda best, result: result.or_better(best), results).images
        only = start()
        # No forward pass over the last patches: in training each one counts.
        (patches,) = descend([Variable(only.patches, rule)], only.losses, steps=self.steps)
        return only.batch.with_patches(patches, only.corners)

    def _start(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None,
        memory: Memory | None,
    ) -> _Start:
        """Draw everything that one run is about: size, shape, bit-width, places, target classes and textures."""
        batch = self._batch(images, generator, precision)
        shifts = None
        if self.init == "pool" and memory is not None:
            rules = self._pool_rules(images)
            patches, corners = worst_starts(batch, model, labels, memory, rules=rules, generator=generator)
        else:
            corners = batch.draw_corners(generator)
            shifts = _draw(len(images), like=images, generator=generator) if self.targeted else None
            patches = self._starts(images, batch.patch_size, generator)
        return _Start(
            model=model,
            batch=batch,
            labels=labels,
            target=self.target,
            shifts=shifts,
            corners=corners,
            patches=patches,
        )

    def _batch(self, images: Tensor, generator: torch.Generator, precision: Precision | None) -> PatchedBatch:
        """Draw a size, a shape and a bit-width for all patches on the images."""
        side = _choose(self._sides(images), generator)
        mask = shape_mask(_choose(self.shapes, generator), side)
        # At a mixed precision the first layer says what is left of an image.
        bits = FLOAT_BITS if precision is None else _FIRST_LAYER_BITS if precision.is_mixed else precision.act
        patch_bits = self._patch_bits(bits, generator)
        # One draw for the batch: a quantizer that differed from step to step would be a moving target.
        image_error, patch_error = (self.noise * torch.randn(2, generator=generator, device=generator.device)).tolist()
        background = fake_quantize(images, bits, step_error=image_error) if self.quantize_image else images
        return PatchedBatch(images=images, background=background, mask=mask, bits=patch_bits, step_error=patch_error)

    def _sides(self, images: Tensor) -> tuple[int, ...]:
        """Return the sides or diameters to draw from, in pixels."""
        side = min(images.shape[-2], images.shape[-1])
        return self.sizes or tuple(max(1, round(share * side)) for share in _SIDES)

    def _starts(self, images: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return patches (N, C, h, w) to start from.

        No picture is chosen for its loss, which would cost forward passes.
        """
        count = len(images)
        noise = _draw(count, images.shape[1], *size, like=images, generator=generator)
        if self.init == "uniform":
            return noise
        pictures = shrunk(images, size)[_draw(count, like=images, generator=generator).argsort()]
        if self.init == "image":
            return pictures
        return pictures.where(_draw(count, 1, 1, 1, like=images, generator=generator) < 0.5, noise)

    def _patch_bits(self, network_bits: int, generator: torch.Generator) -> int:
        """Return the bit-width of the patches."""
        if self.patch_bits == "same":
            return network_bits
        return _choose(DEFAULT_BITS, generator) if self.patch_bits == "random" else self.patch_bits


@dataclass(frozen=True, kw_only=True)
class _Start:
    """The start of one run: images, patches and their places, and what the model is to predict.

    Args:
        model: the model under attack.
        batch: the images, and what all patches on them have in common.
        labels: (N,), the true classes.
        target: class to be predicted; None for any wrong one, or if there are `shifts`.
        shifts: (N,) in [0, 1), which draw a target class for each image; None if there is one for all, or none.
        corners: (N, 2), the places of the patches.
        patches: (N, C, h, w) in [0, 1].
    """

    model: Model
    batch: PatchedBatch
    labels: Tensor
    target: int | None
    shifts: Tensor | None
    corners: Tensor
    patches: Tensor

    def assess(self, patches: Tensor, corners: Tensor) -> AttackResult:
        """Return how the images do with patches at corners."""
        patched = self.batch.with_patches(patches, corners)
        logits = self.model(patched)
        if self.shifts is None:
            goal = AttackGoal.of(self.target, self.labels, loss="cross-entropy")
        else:
            goal = AttackGoal(self.labels, _other_classes(self.labels, self.shifts, logits.shape[1]), "cross-entropy")
        return goal.assess(patched, logits)

    def losses(self, patches: Tensor) -> Tensor:
        """Return the losses (N,) with patches at the places of the start."""
        return self.assess(patches, self.corners).losses


def _draw(*size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw uniform numbers in [0, 1), on the device of `like`."""
    return torch.rand(*size, generator=generator, device=generator.device).to(like.device)


def _choose(choices: Sequence[Choice], generator: torch.Generator) -> Choice:
    """Draw one of the choices."""
    return choices[int(torch.randint(len(choices), (), generator=generator, device=generator.device))]


def _other_classes(labels: Tensor, shifts: Tensor, classes: int) -> Tensor:
    """Return a class other than each label; `shifts` in [0, 1) choose it."""
    return (labels + 1 + (shifts * (classes - 1)).long()) % classes
