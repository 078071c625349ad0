"""BatchNorms folded into the preceding convolutions while patches are made.

In eval mode y = g (w * x + b - mean) / sqrt(var + eps) + beta is a convolution with other weights (Jacob et al. 2018,
section 3.2). The weights are quantized first, as in the network, and folded afterwards: the function stays the same up
to float rounding, which may move a value to the next level of a quantizer. Reported scores are therefore never computed
in this form. `benchmarks/benchmark_attacks.py` measures what it saves.

ReLUs at 32 bit work in place where nothing else reads their input: a convolution does not need its result again.

Optionally, forwards at 32 bit run in bfloat16: patches are optimized by the direction of the gradient, which bfloat16
keeps. At lower precisions the rounding would move values to other levels, so these stay in float32.
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
from qadtr_brevitas.quant.frozen import version_of
from qadtr_brevitas.quant.layers import SwitchableConv2d
from qadtr_brevitas.quant.norm import SwitchableBatchNorm, norms
from qadtr_brevitas.quant.switch import Switch, observing, switch_of

_TOLERANCE = 1e-3
# The least cosine of the gradients in bfloat16 and float32 with which patches are made in bfloat16.
_SAME_DIRECTION = 0.9


@dataclass(frozen=True)
class FoldedNorms:
    """The folded norms, and the folded weights, which are computed once per precision.

    Args:
        switch: the model's switch.
        norm_after: the norm that reads the output of a convolution, by the convolution.
        in_place: whether ReLUs work in place.
        bf16: whether forwards at 32 bit run in bfloat16.
        computed: weights and bias so far, by convolution and precision.
    """

    switch: Switch
    norm_after: Mapping[nn.Module, SwitchableBatchNorm]
    in_place: bool = False
    bf16: bool = False
    computed: dict[tuple[nn.Module, Precision], tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    @property
    def norms(self) -> frozenset[nn.Module]:
        """The folded norms, which return their input."""
        return frozenset(self.norm_after.values())

    def weights(self, conv: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weights and bias of a convolution with its norm folded in.

        Args:
            conv: the layer.
            weight: (out, in / groups, height, width), quantized at the current precision.
            bias: (out,), or None.
        """
        key = (conv, self.switch.precision)
        if key not in self.computed:
            # A tensor of inference mode could not take part in a later forward that records gradients.
            with torch.inference_mode(False), torch.no_grad():
                if weight.is_inference():
                    weight = weight.clone()
                if (norm := self.norm_after.get(conv)) is not None:
                    weight, bias = _folded(norm, self.switch.precision, weight, bias)
                # On CPUs convolutions are faster in channels-last format, which the format of the weights selects.
                if weight.device.type == "cpu":
                    weight = weight.contiguous(memory_format=torch.channels_last)
            self.computed[key] = weight, bias
        return self.computed[key]

    def rounds(self, precision: Precision) -> bool:
        """Return whether forwards at a precision run in bfloat16."""
        return self.bf16 and precision.is_float

    def arithmetic(self, images: Tensor) -> AbstractContextManager[Any]:
        """Return the context that a forward over images runs in, at the current precision."""
        if self.rounds(self.switch.precision):
            return torch.autocast(images.device.type, torch.bfloat16)
        return nullcontext()


@dataclass(frozen=True)
class Foldable:
    """What may be folded while the function stays the same; it does not depend on the weights.

    Args:
        norm_after: the norm that reads the output of a convolution, by the convolution.
        in_place: whether ReLUs may work in place.
    """

    norm_after: Mapping[nn.Module, SwitchableBatchNorm]
    in_place: bool


@contextmanager
def folded_norms(model: nn.Module, images: Tensor, *, bf16: bool = False) -> Generator[FoldedNorms]:
    """Fold the BatchNorms of a model into its convolutions inside a block, as far as the function stays the same.

    Args:
        model: a switchable model in eval mode, whose weights must not change inside.
        images: a few images, (N, 3, H, W) in [0, 1], on the model's device. They show which norm follows which
            convolution, and the folded model is compared with the model on them.
        bf16: run forwards at 32 bit in bfloat16 if gradients with respect to these images keep their direction. Logits
            stay float32.

    Yields:
        The folded norms.

    Raises:
        UsageError: the model is not switchable, or in training mode.
    """
    foldable = find_foldable(model, images)
    with folded(model, foldable, bf16=bf16 and _keeps_direction(model, foldable, images)) as folding:
        yield folding


@contextmanager
def folded(model: nn.Module, foldable: Foldable, *, bf16: bool = False) -> Generator[FoldedNorms]:
    """Fold what was found foldable inside a block; the weights must not change inside.

    Args:
        model: a switchable model in eval mode.
        foldable: what `find_foldable` returned for it.
        bf16: run forwards at 32 bit in bfloat16.

    Yields:
        The folded norms.
    """
    switch = switch_of(model)
    with switch.having(folding=FoldedNorms(switch, foldable.norm_after, foldable.in_place, bf16)):
        folding = switch.folding
        assert isinstance(folding, FoldedNorms)
        yield folding


def find_foldable(model: nn.Module, images: Tensor) -> Foldable:
    """Return most norms with which the logits stay the same: other layers may read or change the output of a layer.

    Args:
        model: a switchable model in eval mode.
        images: a few images, (N, 3, H, W) in [0, 1], on the model's device.

    Raises:
        UsageError: the model is not switchable, or in training mode.
    """
    switch = switch_of(model)
    if any(norm.training for norm in norms(model)):
        raise UsageError("norms are folded with their running statistics: call eval() on the model first")
    # In the rounding of bfloat16 nothing would be seen to stay the same.
    exact_arithmetic = torch.autocast(images.device.type, enabled=False)
    with exact_arithmetic, switch.having(folding=None), observing(model, lambda quantizer, tensor: None):
        expected, norm_after = _find_norms(model, images)
        for found, in_place in ((norm_after, True), (norm_after, False), ({}, True)):
            foldable = Foldable(found, in_place)
            with folded(model, foldable):
                exact = _forward_and_back(model, images)
            if exact is not None and _close(exact[0], expected):
                return foldable
    return Foldable({}, in_place=False)


def _keeps_direction(model: nn.Module, foldable: Foldable, images: Tensor) -> bool:
    """Return whether gradients with respect to images point the same way at 32 bit in bfloat16."""
    gradients: list[Tensor] = []
    with observing(model, lambda quantizer, tensor: None):
        for bf16 in (False, True):
            with folded(model, foldable, bf16=bf16):
                found = _forward_and_back(model, images)
            if found is None:
                return False
            gradients.append(found[1])
    cosine = torch.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0)
    return float(cosine) >= _SAME_DIRECTION


def _forward_and_back(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the logits, and the gradient of the highest ones; None if a layer cannot compute them."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        try:
            logits: Tensor = model(images)
            (gradient,) = torch.autograd.grad(logits.amax(1).sum(), images)
        except RuntimeError:
            # For instance, it needs a tensor that a ReLU has overwritten, or another dtype.
            return None
    return logits.detach(), gradient


def _close(logits: Tensor, expected: Tensor) -> bool:
    return torch.allclose(logits, expected, rtol=0, atol=_TOLERANCE * float(expected.abs().max()))


def _folded(
    norm: SwitchableBatchNorm, precision: Precision, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    mean, var, gain, shift = norm.at(precision)
    folded, offset = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, gain, shift)
    return folded.detach(), offset.detach()


def _find_norms(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[nn.Module, SwitchableBatchNorm]]:
    """Return the logits, and the norms that read the unchanged output of a convolution, where each runs once."""
    outputs: dict[int, tuple[nn.Module, Tensor, int]] = {}
    calls: dict[nn.Module, int] = {}
    norm_after: dict[nn.Module, SwitchableBatchNorm] = {}

    def leave(conv: nn.Module, _: Any, output: Tensor) -> None:
        calls[conv] = calls.get(conv, 0) + 1
        # The tensor is kept so that no other one gets its id.
        outputs[id(output)] = conv, output, version_of(output)

    def enter(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[norm] = calls.get(norm, 0) + 1
        conv, tensor, version = outputs.get(id(inputs[0]), (None, inputs[0], 0))
        if conv is not None and version_of(tensor) == version and isinstance(norm, SwitchableBatchNorm):
            norm_after[conv] = norm

    convs = [module for module in model.modules() if isinstance(module, SwitchableConv2d)]
    handles = [conv.register_forward_hook(leave) for conv in convs]
    handles += [norm.register_forward_pre_hook(enter) for norm in norms(model)]
    try:
        logits: Tensor = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return logits, {conv: norm for conv, norm in norm_after.items() if calls[conv] == calls[norm] == 1}
