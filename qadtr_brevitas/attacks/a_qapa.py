"""A-QAPA: patches made inside the quantized network, from quantized pixels, for training and as an attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import model_validator

from qadtr_brevitas.plugin import STRICT, Field, dataclass
from qadtr_brevitas.precision import DEFAULT_BITS, FLOAT_BITS, MAX_BITS, MIN_BITS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qadtr_brevitas.attacks.base import Model
    from qadtr_brevitas.attacks.per_image import Attempt
    from qadtr_brevitas.precision import Precision

_SHARES = (6 / 32, 8 / 32, 10 / 32)

Choice = TypeVar("Choice")
Bits = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)] | Literal[32]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AQapa:
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
      `targeted=true` goes towards a random other class instead, `target` towards a given one.

    As an attack to evaluate with, it needs what training does not pay for: `keep_best=true` (one more forward pass)
    returns the best iterate of every image instead of the last, over `restarts` that each draw size, shape and places
    anew; `patch_bits=8` keeps patches on the grid of 8-bit images; more and smaller steps, as `steps=50
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
        Literal["uniform", "image", "mixed"],
        Field(description="patches at the start: noise, other images of the batch made as small, or either by chance"),
    ] = "uniform"
    targeted: Annotated[bool, Field(description="aim at a random other class instead of any")] = False
    target: Annotated[int | None, Field(ge=0, description="class to be seen instead; null: see targeted")] = None
    keep_best: Annotated[bool, Field(description="return every image's best iterate instead of the last")] = False
    restarts: Annotated[int, Field(ge=1, description="independent runs, of which the best is kept")] = 1

    @model_validator(mode="after")
    def _one_aim(self) -> AQapa:
        if self.targeted and self.target is not None:
            raise ValueError("targeted draws a class, target gives one: give only one of them")
        if self.restarts > 1 and not self.keep_best:
            raise ValueError("of several restarts the best is kept: give keep_best=true with them")
        return self

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
    ) -> Tensor:
        """Patched images of every image given. The model's parameters get no gradients.

        Args:
            model: in evaluation mode, at `precision`.
            images: (N, 3, H, W) in [0, 1].
            labels: (N,).
            generator: draws sizes, shapes, places, bit-widths and starts.
            precision: what the model runs at; None means not quantized.

        Returns:
            (N, 3, H, W) in [0, 1]; outside the masks equal to the images, quantized if `quantize_image`.

        Raises:
            UsageError: a size larger than the images, or the model has no class `target`.
        """
        import torch

        best: Attempt | None = None
        for _ in range(self.restarts):
            put, patches, shifts = self._draw(images, generator, precision)
            for _ in range(self.steps):
                patches.requires_grad_()
                attempt = self._attempt(model, put(patches), labels, shifts)
                (gradient,) = torch.autograd.grad(attempt.losses.sum(), patches)
                patches = (patches.detach() - self.step_size * gradient.sign()).clamp_(0, 1)
                if self.keep_best:
                    best = attempt.detach().better_of(best)
            if not self.keep_best:
                return put(patches)
            with torch.no_grad():
                best = self._attempt(model, put(patches), labels, shifts).better_of(best)
        assert best is not None
        return best.images

    def _draw(
        self, images: Tensor, generator: torch.Generator, precision: Precision | None
    ) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor | None]:
        """How patches get on the images, patches to start from, and numbers that choose a random other class."""
        import torch

        from qadtr_brevitas.attacks.fake_quantize import fake_quantize
        from qadtr_brevitas.attacks.geometry import paste, random_corners
        from qadtr_brevitas.attacks.shapes import shape_mask

        def draw(*size: int) -> Tensor:
            return torch.rand(*size, generator=generator, device=generator.device).to(images.device)

        image_size = images.shape[-2], images.shape[-1]
        side = _choose(self.sizes or _sides_for(min(image_size)), generator)
        mask = shape_mask(_choose(self.shapes, generator), side)
        bits = FLOAT_BITS if precision is None else precision.act
        patch_bits = self._patch_bits(bits, generator)
        # One draw for the batch: a quantizer that differed from step to step would be a moving target.
        image_error, patch_error = (self.noise * torch.randn(2, generator=generator, device=generator.device)).tolist()
        corners = random_corners(len(images), image_size, (side, side), generator=generator)
        shifts = draw(len(images)) if self.targeted else None
        patches = self._starts(images, side, draw)
        background = fake_quantize(images, bits, step_error=image_error) if self.quantize_image else images

        def put(patches: Tensor) -> Tensor:
            return paste(background, fake_quantize(patches, patch_bits, step_error=patch_error), mask, corners)

        return put, patches, shifts

    def _starts(self, images: Tensor, side: int, draw: Callable[..., Tensor]) -> Tensor:
        """Patches (N, 3, side, side) to start from. No picture is chosen for its loss: that would cost passes."""
        from qadtr_brevitas.attacks.starts import shrunk

        noise = draw(len(images), 3, side, side)
        if self.init == "uniform":
            return noise
        pictures = shrunk(images, (side, side))[draw(len(images)).argsort()]
        if self.init == "image":
            return pictures
        return pictures.where(draw(len(images), 1, 1, 1) < 0.5, noise)

    def _attempt(self, model: Model, patched: Tensor, labels: Tensor, shifts: Tensor | None) -> Attempt:
        """How patched images do."""
        from qadtr_brevitas.attacks.per_image import Aim

        logits = model(patched)
        if shifts is None:
            return Aim.at(self.target, labels, loss="cross-entropy").attempt(patched, logits)
        targets = _other_classes(labels, shifts, logits.shape[1])
        return Aim(labels, targets, "cross-entropy").attempt(patched, logits)

    def _patch_bits(self, network_bits: int, generator: torch.Generator) -> int:
        if self.patch_bits == "same":
            return network_bits
        return _choose(DEFAULT_BITS, generator) if self.patch_bits == "random" else self.patch_bits


def _sides_for(image_side: int) -> tuple[int, ...]:
    return tuple(max(1, round(share * image_side)) for share in _SHARES)


def _choose(choices: Sequence[Choice], generator: torch.Generator) -> Choice:
    import torch

    return choices[int(torch.randint(len(choices), (), generator=generator, device=generator.device))]


def _other_classes(labels: Tensor, shifts: Tensor, classes: int) -> Tensor:
    """A class other than each label; `shifts` in [0, 1) say which."""
    return (labels + 1 + (shifts * (classes - 1)).long()) % classes
