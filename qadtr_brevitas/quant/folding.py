"""BatchNorms folded into the convolutions in front of them, for as long as patches are made.

In eval mode y = g (w * x + b - mean) / sqrt(var + eps) + beta is a convolution with other weights (Jacob et al. 2018,
section 3.2). Here the weights are quantized first, as in the network, and folded then: the function stays the same but
for the rounding of floats, which may carry a value over to the next level of a quantizer. That is why nothing that is
reported is scored in this form. `examples/benchmark_attacks.py` measures what it saves.

ReLUs at 32 bit write over what they read, where nothing else reads it: a convolution does not need its result again.

If wished, forwards at 32 bit run in bfloat16: a patch climbs by the direction of its gradient, which keeps it. At lower
precisions the rounding would carry values over to other levels, so these stay in float32.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant.layers import SwitchableConv2d
from qadtr_brevitas.quant.norm import SwitchableBatchNorm, norms
from qadtr_brevitas.quant.switch import Switch, observing, switch_of

_TOLERANCE = 1e-3
# Cosine of the gradients in bfloat16 and float32 from which on the former is good enough to make patches by.
_SAME_DIRECTION = 0.9


@dataclass(frozen=True)
class FoldedNorms:
    """Which norms are folded, and the weights this gives, made once for each precision.

    Args:
        switch: the model's switch.
        behind: the norm behind a convolution, by the convolution.
        in_place: whether ReLUs write over what they read.
        bf16: whether forwards at 32 bit run in bfloat16.
    """

    switch: Switch
    behind: Mapping[nn.Module, SwitchableBatchNorm]
    in_place: bool = False
    bf16: bool = False
    made: dict[tuple[nn.Module, Precision], tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    @property
    def norms(self) -> frozenset[nn.Module]:
        """The norms that are folded, and have nothing left to do."""
        return frozenset(self.behind.values())

    def weights(self, conv: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights and bias of a convolution with its norm folded in.

        Args:
            conv: the layer.
            weight: (out, in / groups, height, width), quantized at the precision in force.
            bias: (out,), or None.
        """
        key = (conv, self.switch.precision)
        if key not in self.made:
            with torch.no_grad():
                if (norm := self.behind.get(conv)) is not None:
                    weight, bias = _folded(norm, self.switch.precision, weight, bias)
                # On CPUs convolutions are faster if channels come last, and it is the weights that decide it.
                if weight.device.type == "cpu":
                    weight = weight.contiguous(memory_format=torch.channels_last)
            self.made[key] = weight, bias
        return self.made[key]

    def rounds(self, precision: Precision) -> bool:
        """Whether forwards at a precision run in bfloat16."""
        return self.bf16 and precision.is_float

    def arithmetic(self, images: Tensor) -> AbstractContextManager[Any]:
        """What a forward over images runs in, at the precision in force."""
        if self.rounds(self.switch.precision):
            return torch.autocast(images.device.type, torch.bfloat16)
        return nullcontext()


@contextmanager
def folded_norms(model: nn.Module, images: Tensor, *, bf16: bool = False) -> Generator[FoldedNorms]:
    """Folds the BatchNorms of a model into its convolutions inside a block, where this is the same function.

    Args:
        model: a switchable model in eval mode, whose weights must not change inside.
        images: a few images, (N, 3, H, W) in [0, 1], on the model's device: to see what follows what, and to check.
        bf16: run forwards at 32 bit in bfloat16, where gradients to these images keep their direction. Logits stay
            float32.

    Yields:
        What is folded.

    Raises:
        UsageError: the model is not switchable, or in training mode.
    """
    switch = switch_of(model)
    if any(norm.training for norm in norms(model)):
        raise UsageError("norms are folded with their running statistics: call eval() on the model first")
    before, switch.folding = switch.folding, None
    try:
        switch.folding = folding = _possible(model, switch, images, bf16=bf16)
        yield folding
    finally:
        switch.folding = before


def _possible(model: nn.Module, switch: Switch, images: Tensor, *, bf16: bool) -> FoldedNorms:
    """As much as leaves the function what it is: something else may read what a layer gives, or change it."""
    with observing(model, lambda quantizer, tensor: None):
        expected, behind = _follow(model, images)
        for found, in_place in ((behind, True), (behind, False), ({}, True)):
            switch.folding = FoldedNorms(switch, found, in_place)
            exact = _forward_and_back(model, images)
            if exact is not None and _close(exact[0], expected):
                switch.folding = FoldedNorms(switch, found, in_place, bf16)
                rounded = _forward_and_back(model, images) if bf16 else None
                kept = rounded is not None and _same_direction(rounded[1], exact[1])
                # Anew: the weights that were made in this block are not quantized.
                return FoldedNorms(switch, found, in_place, kept)
    return FoldedNorms(switch, {})


def _forward_and_back(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """Logits, and the gradient of the highest ones to the images; None if a layer cannot compute them."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        try:
            logits: Tensor = model(images)
            (gradient,) = torch.autograd.grad(logits.amax(1).sum(), images)
        except RuntimeError:
            # It needs what a ReLU has written over, say, or its own dtype.
            return None
    return logits.detach(), gradient


def _close(logits: Tensor, expected: Tensor) -> bool:
    return torch.allclose(logits, expected, rtol=0, atol=_TOLERANCE * float(expected.abs().max()))


def _same_direction(first: Tensor, second: Tensor) -> bool:
    return float(torch.cosine_similarity(first.flatten(), second.flatten(), dim=0)) >= _SAME_DIRECTION


def _folded(
    norm: SwitchableBatchNorm, precision: Precision, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    mean, var, gain, shift = norm.at(precision)
    folded, offset = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, gain, shift)
    return folded.detach(), offset.detach()


def _follow(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[nn.Module, SwitchableBatchNorm]]:
    """The logits, and the norms that are given just what a convolution gives, each layer used once."""
    given: dict[int, tuple[nn.Module, Tensor, int]] = {}
    calls: dict[nn.Module, int] = {}
    behind: dict[nn.Module, SwitchableBatchNorm] = {}

    def leave(conv: nn.Module, _: Any, output: Tensor) -> None:
        calls[conv] = calls.get(conv, 0) + 1
        # The tensor is kept, so that no other one gets its id.
        given[id(output)] = conv, output, _version(output)

    def enter(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[norm] = calls.get(norm, 0) + 1
        conv, tensor, version = given.get(id(inputs[0]), (None, inputs[0], 0))
        if conv is not None and _version(tensor) == version and isinstance(norm, SwitchableBatchNorm):
            behind[conv] = norm

    convs = [module for module in model.modules() if isinstance(module, SwitchableConv2d)]
    handles = [conv.register_forward_hook(leave) for conv in convs]
    handles += [norm.register_forward_pre_hook(enter) for norm in norms(model)]
    try:
        logits: Tensor = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return logits, {conv: norm for conv, norm in behind.items() if calls[conv] == calls[norm] == 1}


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return tensor._version
