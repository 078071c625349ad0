"""Has a file round like PyTorch where a value lies within the last bits of floats of halfway between two levels.

FPGA compilers merge a BatchNorm's parameters into a factor and an offset, and round these in a way of their own: 13.5
levels in PyTorch were 13.4999996 in hls4ml, a level lower, and logits moved by a hundredth. BatchNorms and biases apply
to integers times a step, so all values that can come out are known. The offset is moved, by some millionths of the
value, until none of them lies so near to a tie; each keeps the level that PyTorch gives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from qadtr_brevitas.exporting.graph import attribute, bits_of, nodes_of, scale_of
from qadtr_brevitas.exporting.rewrite import PIXELS

# These give an output no values but those of their input, in the same order.
_PASSING = ("Relu", "MaxPool", "Flatten", "Reshape", "Identity")
# Several roundings of float32, 2^-24 of each term, and of hls4ml's fixed<48,16>, 2^-32 of the integers.
_FLOAT_ROOM, _FIXED_ROOM = 2.0**-20, 2.0**-30


@dataclass(frozen=True)
class _Grid:
    """What a channel's values can be: the integers from low to high times a step, (C,) or (1,) each."""

    step: Any
    low: Any
    high: Any


def clear_near_ties(model: Any) -> None:
    """Move offsets of BatchNorms, and biases without one, in place.

    Args:
        model: a qonnx ModelWrapper with all shapes, before compilers change it.
    """
    for node in nodes_of(model, "BatchNormalization", "Conv", "Gemm"):
        quants = _quants_behind(model, node.output[0])
        if quants and (node.op_type == "BatchNormalization" or _bias(model, node) is not None):
            _clear(model, node, quants)


def _clear(model: Any, node: Any, quants: list[Any]) -> None:
    is_norm = node.op_type == "BatchNormalization"
    given = model.find_producer(node.input[0]) if is_norm else node
    bias = None if given is None else _bias(model, given)
    grid = _products(model, given) if bias is not None else _grid(model, node.input[0])
    if grid is None:
        return
    bias = np.zeros(1, np.float32) if bias is None else bias
    eps = attribute(node, "epsilon", 1e-5)
    norm = [model.get_initializer(name) for name in node.input[1:5]] if is_norm else _no_norm(len(bias))
    gamma, beta, mean, var = (value.astype(np.float64) for value in norm)
    factor = gamma / np.sqrt(var + (eps if is_norm else 0))
    offset = beta + (bias - mean) * factor
    # What a shift has to be more and less than, with room for roundings and without.
    least, most = np.full((2, len(offset)), -np.inf), np.full((2, len(offset)), np.inf)
    for quant in quants:
        step, low, high = float(scale_of(model, quant)), *_range(model, quant)
        sums = _beside(np.arange(low, high) + 0.5, step, factor, offset, grid)
        products = sums * _column(grid.step)
        found = torch.from_numpy((products.astype(np.float32) + _column(bias))[None])
        if is_norm:
            mean32, var32, gamma32, beta32 = (torch.from_numpy(norm[i].copy()) for i in (2, 3, 0, 1))
            found = F.batch_norm(found, mean32, var32, gamma32, beta32, eps=eps)
        levels = np.clip(np.round(found[0].numpy() / np.float32(step)), low, high).astype(np.float64)
        terms = [products * _column(factor), _column(bias * factor), _column(mean * factor), _column(beta)]
        room = _FLOAT_ROOM * sum(np.abs(term) for term in terms) + _FIXED_ROOM * (1 + np.abs(products))
        values = terms[0] + _column(offset)
        above = np.where(levels > low, (levels - 0.5) * step - values, -np.inf)
        below = np.where(levels < high, (levels + 0.5) * step - values, np.inf)
        least = np.maximum(least, [(above + room).max(1), above.max(1)])
        most = np.minimum(most, [(below - room).min(1), below.min(1)])
    # Values of a bias that are ties, one rounded up and the next down, become so exactly: all round these to even.
    is_narrow = least[0] > most[0]
    shift = np.clip(0, least[0], most[0])
    shift[is_narrow] = (least[1, is_narrow] + most[1, is_narrow]) / 2
    name = node.input[2]
    model.set_initializer(name, (model.get_initializer(name).astype(np.float64) + shift).astype(np.float32))


def _no_norm(channels: int) -> list[Any]:
    """Return gamma, beta, mean and variance of a BatchNorm that changes nothing."""
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    return [ones, zeros, zeros, ones]


def _beside(ties: Any, step: float, factor: Any, offset: Any, grid: _Grid) -> Any:
    """Return the integers (C, 2 T) to both sides of T ties, of those that a channel can have."""
    slope = np.where(factor == 0, 1, factor) * grid.step
    at = (ties * step - offset[:, None]) / slope[:, None]
    near = np.concatenate([np.floor(at), np.floor(at) + 1], axis=1)
    return np.clip(near, _column(grid.low), _column(grid.high))


def _column(values: Any) -> Any:
    return np.asarray(values)[:, None]


def _range(model: Any, quant: Any) -> tuple[int, int]:
    """Return the lowest and the highest level of a quantizer."""
    bits, signed = bits_of(model, quant), attribute(quant, "signed")
    low = -(2 ** (bits - 1)) if signed else 0
    return low + attribute(quant, "narrow", 0), low + 2**bits - 1


def _quants_behind(model: Any, name: str) -> list[Any]:
    """Return the quantizers that round a tensor's values."""
    found: list[Any] = []
    for reader in model.find_consumers(name):
        if reader.op_type == "Quant":
            found.append(reader)
        elif reader.op_type in _PASSING:
            found += _quants_behind(model, reader.output[0])
    return found


def _bias(model: Any, node: Any) -> Any:
    """Return the bias of a layer, (C,) float32; None for another node or where it has none."""
    if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
        return None
    return model.get_initializer(node.input[2])


def _grid(model: Any, name: str) -> _Grid | None:
    """Return what the values of a tensor can be; None where that is not known."""
    if name == model.graph.input[0].name:
        return _Grid(np.array([1 / PIXELS]), np.zeros(1), np.array([PIXELS]))
    node = model.find_producer(name)
    if node is None:
        return None
    if node.op_type == "Quant":
        return _Grid(scale_of(model, node).reshape(-1), *(np.array([end]) for end in _range(model, node)))
    if node.op_type in _PASSING:
        return _grid(model, node.input[0])
    if node.op_type == "Add":
        first, second = (_grid(model, given) for given in node.input)
        if first is None or second is None or not np.array_equal(first.step, second.step):
            return None
        return _Grid(first.step, first.low + second.low, first.high + second.high)
    is_plain = node.op_type in ("Conv", "Gemm") and _bias(model, node) is None
    return _products(model, node) if is_plain else None


def _products(model: Any, node: Any) -> _Grid | None:
    """Return what a layer's sums of products can be, without its bias."""
    given, quant = _grid(model, node.input[0]), model.find_producer(node.input[1])
    if given is None or len(given.step) > 1 or quant is None or quant.op_type != "Quant":
        return None
    weights, steps = model.get_initializer(quant.input[0]), scale_of(model, quant)
    if weights is None or (node.op_type == "Gemm" and not attribute(node, "transB", 0)):
        return None
    steps = np.broadcast_to(steps, (len(weights), *[1] * (weights.ndim - 1)) if steps.ndim else weights.shape)
    steps = steps.reshape(len(weights), -1)[:, :1]
    ints = np.clip(np.round(weights.reshape(len(weights), -1) / steps), *_range(model, quant))
    ends = [ints * given.low, ints * given.high]
    # A border of zeros adds nothing.
    low, high = np.minimum(0, np.minimum(*ends)).sum(1), np.maximum(0, np.maximum(*ends)).sum(1)
    return _Grid(steps[:, 0] * given.step, low, high)
