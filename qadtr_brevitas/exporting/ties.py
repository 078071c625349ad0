"""Values halfway between two levels, which FINN rounds up, and PyTorch, QONNX and onnxruntime to the even level.

FINN makes thresholds of quantizers, x >= (k + 1/2) step. Learned steps meet no ties; steps that are powers of two do,
where one quantizer reads what another has given.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from brevitas.core.function_wrapper.ops_ste import RoundSte
from brevitas.proxy.runtime_quant import FusedActivationQuantProxy
from torch import Tensor, nn

from qadtr_brevitas.core.errors import ExportError
from qadtr_brevitas.data.split import Split

_SAME_CLASS = 0.99
_BATCH = 50


@dataclass(frozen=True)
class Ties:
    """What rounding ties up does to a network.

    Args:
        images: how many images were looked at.
        values: how many activations were quantized.
        ties: how many of them lay halfway between two levels.
        max_difference: largest absolute difference of two logits, ties up against ties to even.
        same_class: share of the images that get the same class.
    """

    images: int
    values: int
    ties: int
    max_difference: float
    same_class: float


def count_ties(frozen: nn.Module, split: Split) -> Ties:
    """Count ties on images, and compare both ways to round them.

    Args:
        frozen: a frozen model of Brevitas's stock quantizers; left untouched.
        split: the images, all of which are used.
    """
    up = copy.deepcopy(frozen)
    counters = list(_count_in(up))
    found: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for index in torch.arange(len(split)).split(_BATCH):
            images, _ = split.batch(index)
            found.append((frozen(images), up(images)))
    even, upwards = (torch.cat(logits) for logits in zip(*found, strict=True))
    return Ties(
        images=len(split),
        values=sum(counter.values for counter in counters),
        ties=sum(counter.ties for counter in counters),
        max_difference=float((even - upwards).abs().max()),
        same_class=float((even.argmax(1) == upwards.argmax(1)).float().mean()),
    )


def check_ties(ties: Ties) -> None:
    """Refuses a network to which it matters how ties are rounded.

    Raises:
        ExportError: another class for more images than one, and than one in a hundred.
    """
    if 1 - ties.same_class > max(1 - _SAME_CLASS, 1.01 / ties.images):
        raise ExportError(
            f"FINN rounds values halfway between two levels up, {ties.ties} of {ties.values} here, and would give only "
            f"{ties.same_class:.1%} of {ties.images} images the class that the network gives them: convert it with "
            "--target finn, whose steps are no powers of two"
        )


class _UpRounding(nn.Module):
    """Rounds ties up, and counts them."""

    def __init__(self, lo: float, hi: float) -> None:
        super().__init__()
        self.lo, self.hi = lo, hi
        self.values = self.ties = 0

    def forward(self, x: Tensor) -> Tensor:
        below = x.floor()
        self.values += x.numel()
        # What is clipped anyway cannot matter.
        self.ties += int(((x - below == 0.5) & (x > self.lo) & (x < self.hi)).sum())
        return (x + 0.5).floor()


def _count_in(frozen: nn.Module) -> Iterator[_UpRounding]:
    """Replace the rounding of activations in place."""
    for module in frozen.modules():
        if isinstance(module, FusedActivationQuantProxy):
            quant: Any = module.tensor_quant
            bits = quant.msb_clamp_bit_width_impl()
            assert isinstance(quant.int_quant.float_to_int_impl, RoundSte)
            rounding = _UpRounding(float(quant.int_quant.min_int(bits)), float(quant.int_quant.max_int(bits)))
            quant.int_quant.float_to_int_impl = rounding
            yield rounding
