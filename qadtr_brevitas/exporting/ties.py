"""Values halfway between two levels, which FINN rounds up, and PyTorch, QONNX and onnxruntime to the even level.

FINN makes thresholds of quantizers, x >= (k + 1/2) step. Behind a BatchNorm no value lies on a threshold. Bytes do, and
so do the levels of one quantizer that another one reads, where both ranges come from the same maximum: their ratio is a
simple fraction. There the last bit of a float decides. A network is written with its means and such ranges moved by
some hundred-thousandths, so that all executors decide alike.
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
from qadtr_brevitas.exporting.rewrite import PIXELS
from qadtr_brevitas.quant.freeze import FrozenModel
from qadtr_brevitas.quant.products import QuantizedProduct

# Share of all images that may change their class, and how often a network of which so many do would be refused.
_CHANGED, _LEVEL = 0.01, 0.01
_BATCH = 50
# Float operations move a value by less, in shares of it.
_CLOSE = 4e-6
# Fewer values of a quantizer that lie so close to halfway are chance, which no change of its range would cure.
_SYSTEMATIC = 3
_NUDGE = 2e-5
# Shifts of pixels that are tried, in levels, and the distance from halfway that is enough.
_SHIFTS = (0.0, 2e-4, -2e-4, 5e-4, -5e-4, 1e-3, -1e-3)
_CLEAR = 1e-4


@dataclass(frozen=True)
class Ties:
    """What another decision about values halfway between two levels does to a network.

    Args:
        images: how many images were looked at.
        values: how many activations were quantized.
        ties: how many of them lie halfway between two levels, as far as floats can tell.
        max_difference: largest absolute difference of two logits, as exported against ties to even.
        same_class: share of the images that get the same class.
    """

    images: int
    values: int
    ties: int
    max_difference: float
    same_class: float


def break_ties(frozen: FrozenModel, images: Tensor) -> FrozenModel:
    """Return a copy whose bytes and requantized levels do not lie halfway between two levels.

    Bytes keep their levels, as PyTorch rounds them, wherever a shift of a thousandth of a level allows that.

    Args:
        frozen: a frozen model of Brevitas's stock quantizers; left untouched.
        images: some images to find ties on, (N, C, H, W) in [0, 1].
    """
    broken, watched = copy.deepcopy(frozen), copy.deepcopy(frozen)
    counters = list(_count_in(watched))
    with torch.no_grad():
        watched(images)
    normalized = (images - frozen.mean) / frozen.std
    for quant, counter in zip(_act_quants(broken), counters, strict=True):
        if counter.reads(normalized / _step(quant)):
            broken.mean.sub_(_shift(frozen, quant).view_as(frozen.mean) * frozen.std * _step(quant))
        elif counter.ties >= _SYSTEMATIC:
            quant.scaling_impl.value.data.mul_(1 - _NUDGE)
    return broken


def _shift(frozen: FrozenModel, quant: Any) -> Tensor:
    """Return by how many levels the pixels of each channel move, (C,)."""
    low, high = _range(quant)
    pixels = torch.arange(256).view(-1, 1) / PIXELS
    mean, std = frozen.mean.reshape(1, -1), frozen.std.reshape(1, -1)
    wanted = ((pixels - mean) / std / _step(quant)).round().clamp(low, high)
    exact = (pixels.double() - mean.double()) / std.double() / _step(quant)
    merits: list[Tensor] = []
    for shift in _SHIFTS:
        moved = exact + shift
        distance = torch.where((moved > low) & (moved < high), (moved - moved.floor() - 0.5).abs(), 0.5)
        same = (moved.round().clamp(low, high) == wanted).float().mean(0)
        # Clear of ties first; then like PyTorch for as many bytes as possible; the smallest shift of equal ones.
        merits.append((distance.amin(0) >= _CLEAR).float() * 2 + same)
    return torch.tensor(_SHIFTS)[torch.stack(merits).argmax(0)]


def count_ties(frozen: FrozenModel, broken: FrozenModel, split: Split) -> Ties:
    """Count ties on images, and compare a network with what `break_ties` made of it.

    Args:
        frozen: a frozen model of Brevitas's stock quantizers; left untouched.
        broken: the same network with ties broken.
        split: the images, all of which are used.
    """
    watched = copy.deepcopy(frozen)
    counters = list(_count_in(watched))
    found: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for index in torch.arange(len(split)).split(_BATCH):
            images, _ = split.batch(index)
            images = (images * PIXELS).round() / PIXELS
            found.append((watched(images), broken(images)))
    even, exported = (torch.cat(logits) for logits in zip(*found, strict=True))
    return Ties(
        images=len(split),
        values=sum(counter.values for counter in counters),
        ties=sum(counter.ties for counter in counters),
        max_difference=float((even - exported).abs().max()),
        same_class=float((even.argmax(1) == exported.argmax(1)).float().mean()),
    )


def check_ties(ties: Ties) -> None:
    """Refuses a network to which it matters how ties are rounded.

    Raises:
        ExportError: so many of the images get another class that it is more than one in a hundred of all images, by a
            one-sided binomial test (p < 0.01).
    """
    from scipy.stats import binomtest

    changed = round((1 - ties.same_class) * ties.images)
    if binomtest(changed, ties.images, _CHANGED, alternative="greater").pvalue < _LEVEL:
        raise ExportError(
            f"FINN rounds values halfway between two levels up, {ties.ties} of {ties.values} here, and would give only "
            f"{ties.same_class:.1%} of {ties.images} images the class that the network gives them: take more bits, or "
            "convert it with other steps (another --method or more --samples, and --target finn, whose steps are no "
            "powers of two)"
        )


class _CountingRound(nn.Module):
    """Rounds to even, and counts values so close to halfway that float operations decide about them."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.values = self.ties = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        close = (x - x.floor() - 0.5).abs() <= _CLOSE * x.abs()
        self.values += x.numel()
        # What is clipped anyway cannot matter.
        self.ties += int((close & (x > self.low) & (x < self.high)).sum())
        self.last = x
        return x.round()

    def reads(self, x: Tensor) -> bool:
        """Return whether these values, in levels, are what was rounded last."""
        return self.last is not None and self.last.shape == x.shape and torch.allclose(self.last, x, atol=1e-3)


def _act_quants(frozen: nn.Module) -> Iterator[Any]:
    """Yield Brevitas's quantizers of activations, which have no types.

    Weights that a module multiplies in its own forward have a proxy of the same kind.
    """
    products = [module for module in frozen.modules() if isinstance(module, QuantizedProduct)]
    weights = [product.operands["weight"] for product in products if "weight" in product.operands]
    of_weights = {part for weight in weights for part in weight.modules()}
    for module in frozen.modules():
        if isinstance(module, FusedActivationQuantProxy) and module not in of_weights:
            yield module.tensor_quant


def _step(quant: Any) -> float:
    return float(quant(torch.zeros(1))[1].detach())


def _range(quant: Any) -> tuple[float, float]:
    """Return the lowest and the highest level."""
    bits = quant.msb_clamp_bit_width_impl()
    return float(quant.int_quant.min_int(bits)), float(quant.int_quant.max_int(bits))


def _count_in(frozen: nn.Module) -> Iterator[_CountingRound]:
    """Replace the rounding of activations in place."""
    for quant in _act_quants(frozen):
        assert isinstance(quant.int_quant.float_to_int_impl, RoundSte)
        quant.int_quant.float_to_int_impl = _CountingRound(*_range(quant))
        yield quant.int_quant.float_to_int_impl
