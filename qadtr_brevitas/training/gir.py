"""Gradient-inconsistent regularization: the recipe keys. The work is done in `gir_optimizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from qadtr_brevitas.plugin import STRICT, Field, PrecisionField, dataclass

if TYPE_CHECKING:
    import torch

    from qadtr_brevitas.training.gir_optimizer import GirOptimizer


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Gir:
    """Gradient-inconsistent regularization (QADT-R, eq. 4 and 5; defaults of its Table 17).

    Each parameter gradient g becomes g + alpha * (beta * g / (|g| + eps) + gamma * xi), xi ~ N(0, sigma^2), on a
    share `frequency` of the steps. Decisions where the paper is silent or cannot be meant, and the alternative:

    - eps: printed outside the fraction, where it adds a constant to every coordinate and does not prevent a division
      by zero. Here it is inside; `eps_placement: literal` is as printed (with g / |g| = 0 for a zero gradient).
    - gamma has no value in the paper. Here 1 in `mode: absolute`, the formula as printed. Its noise has the same size
      for every gradient, so the angle it turns a gradient by depends on the size of the net and of the gradient.
      `mode: relative` instead adds noise whose norm is `rho` times that of the gradient it is added to (alpha, gamma
      and sigma do not matter to it then): the expected cosine between g and the result is 1 / sqrt(1 + rho^2).
      With gamma 0 the direction of each tensor's gradient is unchanged, so that nothing is misaligned.
    - |g|: `norm: tensor`, or `global` over all parameters.
    - "injected at lower-bit models": at every precision but 32; `float_too: true` perturbs there too, and `only`
      names the precisions to perturb.
    - Frequency: drawn independently for each step.
    - Which parameters: weights, biases and norms, not the quantizers' thresholds.
    - Place: after clipping, just before the optimizer, so that clipping does not undo it.

    GIR changes what training arrives at and nothing else. It gives no protection by itself at inference: an attacker
    who has the weights has exact gradients.
    """

    alpha: Annotated[float, Field(ge=0, description="strength of the perturbation")] = 0.1
    beta: Annotated[float, Field(ge=0, description="scale of the normalized gradient")] = 1.0
    gamma: Annotated[float, Field(ge=0, description="scale of the noise (mode absolute)")] = 1.0
    sigma: Annotated[float, Field(ge=0, description="standard deviation of the noise (mode absolute)")] = 0.05
    eps: Annotated[float, Field(gt=0, description="keeps the normalized gradient finite")] = 1e-5
    frequency: Annotated[float, Field(ge=0, le=1, description="share of the steps that are perturbed")] = 0.5
    mode: Annotated[Literal["absolute", "relative"], Field(description="size of the noise")] = "absolute"
    rho: Annotated[float, Field(ge=0, description="noise norm over gradient norm (mode relative)")] = 0.5
    norm: Annotated[Literal["tensor", "global"], Field(description="what |g| is taken over")] = "tensor"
    eps_placement: Annotated[Literal["inside", "literal"], Field(description="eps in or after the fraction")] = "inside"
    float_too: Annotated[bool, Field(description="perturb steps at 32 bit too")] = False
    only: Annotated[
        tuple[PrecisionField, ...] | None,
        Field(description="precisions to perturb; null: every one (32 see float_too)"),
    ] = None

    def wrap(self, optimizer: torch.optim.Optimizer, *, seed: int) -> GirOptimizer:
        """Wraps any optimizer, so that its steps see perturbed gradients; the optimizer itself is not changed."""
        from qadtr_brevitas.training.gir_optimizer import GirOptimizer

        return GirOptimizer(optimizer, self, seed=seed)
