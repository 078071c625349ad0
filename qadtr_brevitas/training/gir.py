"""Gradient-inconsistent regularization (GIR): perturbed gradients, and the optimizer wrapper that makes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from math import isnan
from random import Random
from typing import Annotated, Any, Literal

import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from qadtr_brevitas.core.plugin import Field, PrecisionField, plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.seeding import derive_seed, generator
from qadtr_brevitas.training.gradient_rules import GradientRule, GradientRuleOptimizer

# Torch's operations on lists of tensors are named with an underscore, but torch's optimizers and others build on them.
# pyright: reportPrivateUsage=false, reportIncompatibleVariableOverride=false

GIR_KEY = "gir"
_STEP_KEY = "gir_step"


@plugin
class Gir(GradientRule):
    """Gradient-inconsistent regularization (QADT-R, eq. 4 and 5; defaults of its Table 17).

    Each parameter gradient g becomes g + alpha * (beta * g / (|g| + eps) + gamma * xi), xi ~ N(0, sigma^2), on a
    share `frequency` of the steps. Decisions where the paper gives no value, or a formula that fails, and alternatives:

    - eps: printed outside the fraction, where it adds a constant to every coordinate and does not prevent a division
      by zero. Here it is inside; `eps_placement: literal` is as printed (with g / |g| = 0 for a zero gradient).
    - gamma has no value in the paper. Here it is 1 in `mode: absolute`, the formula as printed. Its noise has the same
      size for every gradient, so the angle between g and the result depends on the sizes of network and gradient.
      `mode: relative` instead adds noise whose norm is `rho` times that of the gradient it is added to (alpha, gamma
      and sigma have no effect then): the expected cosine between g and the result is 1 / sqrt(1 + rho^2).
      With gamma 0 the direction of the gradient of each tensor does not change.
    - |g|: `norm: tensor`, or `global` over all parameters.
    - "injected at lower-bit models": at every precision but 32; `float_too: true` perturbs there too, and `only`
      names the precisions to perturb.
    - Frequency: drawn independently for each step.
    - Which parameters: weights, biases and norms, not the quantizers' thresholds.
    - Place: after clipping, just before the optimizer, so that clipping does not undo it.

    GIR changes the trained weights and nothing else. It is no protection at inference: an attacker who has the weights
    has exact gradients.
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

    @field_validator("only")
    @classmethod
    def _float_needs_float_too(
        cls, only: tuple[Precision, ...] | None, info: ValidationInfo
    ) -> tuple[Precision, ...] | None:
        if any(precision.is_float for precision in only or ()) and not info.data.get("float_too", True):
            raise ValueError("32 is perturbed only with float_too: true: set that too, or remove 32")
        return only

    @property
    def precisions(self) -> tuple[Precision, ...] | None:
        """The precisions in `only`, or None for every one."""
        return self.only

    def wrap(self, optimizer: torch.optim.Optimizer, *, seed: int) -> GirOptimizer:
        """Return a wrapper of any optimizer whose steps see perturbed gradients."""
        return GirOptimizer(optimizer, self, seed=seed)


class GirOptimizer(GradientRuleOptimizer):
    """An optimizer whose `step` sees gradients perturbed by `Gir`; everything else is the wrapped optimizer's own.

    Groups, state, `state_dict`, hooks and learning rate schedulers are those of the wrapped optimizer. The gradients
    are changed in place. With a GradScaler they are perturbed after unscaling, because the wrapper does not offer the
    fused unscaling of some optimizers.

    The noise depends on (seed, step, index of the parameter) only, so every rank draws the same and replicas stay
    equal. Parameters whose gradient is None are untouched.

    Parameter groups with `"gir": False` are left alone.

    Args:
        optimizer: the optimizer to wrap.
        rule: strength, frequency and form of the perturbation.
        seed: seed of the noise.

    Attributes:
        last_cosine: cosine between the raw and the perturbed gradient of all parameters at the last step; None where
            that step was not perturbed, or its gradient was zero.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rule: Gir, *, seed: int) -> None:
        # Not super().__init__, which would make groups and hooks of its own.
        self.optimizer = optimizer
        self.rule = rule
        self.seed = seed
        self._step = 0
        self._precision: Precision | None = None
        self._cosine: Tensor | None = None

    def set_context(self, *, step: int, precision: Precision | None) -> None:
        """Set the number of the next step and the precision of its gradient; at None the gradient is perturbed.

        Without this call, steps are counted from 0 and gradients are perturbed at every precision.
        """
        self._step = step
        self._precision = precision
        # A step that a GradScaler skips has no cosine.
        self._cosine = None

    @property
    def last_cosine(self) -> float | None:
        """Cosine at the last step. Reading it waits for the device, so read it no more often than it is logged."""
        if self._cosine is None:
            return None
        cosine = self._cosine.item()
        return None if isnan(cosine) else cosine

    def metrics(self) -> dict[str, float]:
        """Return `last_cosine` as `gir_cosine`, if there is one."""
        cosine = self.last_cosine
        return {} if cosine is None else {"gir_cosine": cosine}

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Perturb the gradients in place, on a share of the steps, and take a step of the wrapped optimizer.

        A closure is called once, before the perturbation. The wrapped optimizer does not get it: optimizers that call
        it again (L-BFGS) would undo the perturbation.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._cosine = self._perturb() if self._is_due() else None
        self._step += 1
        result = self.optimizer.step()
        return result if loss is None else loss

    @torch.no_grad()
    def _perturb(self) -> Tensor | None:
        """Add the perturbation to every gradient, in place, and return the cosine (0-dim, on the device)."""
        indexed = [(index, p.grad) for index, p in enumerate(self._parameters()) if p.grad is not None]
        if not indexed:
            return None
        gradients = [gradient for _, gradient in indexed]
        norms = _norms(gradients)
        changes = self._noise(indexed)
        scales = self._normalized_scales(norms)
        if self.rule.mode == "absolute":
            torch._foreach_mul_(changes, self.rule.alpha * self.rule.gamma * self.rule.sigma)
        else:
            torch._foreach_mul_(changes, list(self._relative_scales(gradients, norms * (1 + scales))))
        torch._foreach_add_(changes, torch._foreach_mul(gradients, list(scales)))
        if self.rule.eps_placement == "literal":
            torch._foreach_add_(changes, self.rule.alpha * self.rule.eps)
        cosine = _cosine(gradients, changes, norms)
        torch._foreach_add_(gradients, changes)
        return cosine

    def _normalized_scales(self, norms: Tensor) -> Tensor:
        """Return alpha * beta / (|g| + eps) for each gradient, (parameters,)."""
        if self.rule.norm == "global":
            norms = norms.norm().expand_as(norms)
        if self.rule.eps_placement == "inside":
            return self.rule.alpha * self.rule.beta / (norms + self.rule.eps)
        return torch.where(norms > 0, self.rule.alpha * self.rule.beta / norms, 0.0)

    def _relative_scales(self, gradients: list[Tensor], norms: Tensor) -> Tensor:
        """Return the deviation at which noise has rho times the norm of each gradient, (parameters,)."""
        sizes = norms.new_tensor([gradient.numel() for gradient in gradients])
        if self.rule.norm == "global":
            return (self.rule.rho * norms.norm() / sizes.sum().sqrt()).expand_as(norms)
        return self.rule.rho * norms / sizes.sqrt()

    def _noise(self, indexed: list[tuple[int, Tensor]]) -> list[Tensor]:
        """Return standard normal noise for each gradient."""
        return [
            torch.empty_like(gradient).normal_(
                generator=generator(self.seed, "gir", self._step, index, device=gradient.device)
            )
            for index, gradient in indexed
        ]

    def _is_due(self) -> bool:
        if self._precision is not None:
            if self._precision.is_float and not self.rule.float_too:
                return False
            if self.rule.only is not None and self._precision not in self.rule.only:
                return False
        return Random(derive_seed(self.seed, "gir", self._step)).random() < self.rule.frequency

    def _parameters(self) -> list[Tensor]:
        groups = [group for group in self.optimizer.param_groups if group.get(GIR_KEY, True)]
        return [parameter for group in groups for parameter in group["params"]]

    # Everything below is the wrapped optimizer's own.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        return self.optimizer.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients to None or zero."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state with the number of the next step."""
        return {**self.optimizer.state_dict(), _STEP_KEY: self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state of this wrapper, or of the wrapped optimizer alone."""
        own = dict(state_dict)
        self._step = own.pop(_STEP_KEY, self._step)
        self.optimizer.load_state_dict(own)

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """Register a hook with the wrapped optimizer, which sees the perturbed gradients."""
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """Register a hook with the wrapped optimizer."""
        return self.optimizer.register_step_post_hook(hook)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register a hook with the wrapped optimizer."""
        return self.optimizer.register_state_dict_pre_hook(hook, prepend=prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register a hook with the wrapped optimizer."""
        return self.optimizer.register_state_dict_post_hook(hook, prepend=prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register a hook with the wrapped optimizer."""
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend=prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register a hook with the wrapped optimizer."""
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend=prepend)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _norms(tensors: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of each tensor, (tensors,), on the device of the first."""
    norms = torch._foreach_norm(tensors)
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def _cosine(gradients: list[Tensor], changes: list[Tensor], norms: Tensor) -> Tensor:
    """Return the cosine between gradients and gradients + changes, without copying them; NaN for a zero gradient."""
    products = torch._foreach_mul(gradients, changes)
    dot = torch.stack([product.sum().to(norms.device) for product in products]).sum()
    raw, change = norms.square().sum(), _norms(changes).square().sum()
    return (raw + dot) / (raw * (raw + 2 * dot + change)).sqrt()
