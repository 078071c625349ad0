#!/usr/bin/env python3
"""Compute a network in integers from model.json and model.safetensors, which lie beside it. It needs numpy alone.

    network = IntegerNetwork("model.json")
    logits = network.run(images)                      # bytes (n, C, H, W) to float logits (n, classes)
    tensors = network.tensors(images)                 # every integer tensor on the way, by name

Every tensor holds integers. A product is a sum of integer products; `combine` brings sums to the levels of the next
layer: (sum of inputs * multipliers + offset) / 2^shift, rounded, ties to even, and clipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

_TYPES = {"U8": np.uint8, "I64": np.int64, "F64": np.float64}
_LOWEST = -(2**62)


class IntegerNetwork:
    """A network that computes in integers.

    Args:
        path: model.json; model.safetensors lies beside it.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.graph: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.stored = read_safetensors(path.with_suffix(".safetensors"))
        self.weights = {
            name: unpack(self.stored[name], facts["bits"], facts["shape"])
            for name, facts in self.graph["weights"].items()
        }

    def run(self, images: Any) -> Any:
        """Return float32 logits, (n, classes), of images as bytes or whole numbers from 0 to 255, (n, C, H, W)."""
        output = self.graph["output"]
        return (self.tensors(images)[output["tensor"]] * output["step"]).astype(np.float32)

    def tensors(self, images: Any) -> dict[str, Any]:
        """Return every tensor by name, as int64, of images (n, C, H, W)."""
        given = self.graph["input"]
        if list(images.shape[1:]) != given["shape"]:
            raise ValueError(f"images have the shape {list(images.shape[1:])}: give {given['shape']}")
        found = {given["tensor"]: np.rint(images).astype(np.int64)}
        for operation in self.graph["operations"]:
            inputs = [found[name] for name in operation["inputs"]]
            compute = getattr(self, "_" + operation["operation"].replace("-", "_"))
            found[operation["output"]] = compute(operation, *inputs)
        return found

    def _conv(self, operation: dict[str, Any], x: Any) -> Any:
        weights, groups = self.weights[operation["weight"]], operation["groups"]
        kernel, strides, dilations = weights.shape[2:], operation["strides"], operation["dilations"]
        top, left, bottom, right = operation["pads"]
        x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        reach = [dilation * (side - 1) + 1 for dilation, side in zip(dilations, kernel, strict=True)]
        patches = np.lib.stride_tricks.sliding_window_view(x, reach, axis=(2, 3))
        patches = patches[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
        count, _, height, width = patches.shape[:4]
        # (n, groups, inputs of a group, kernel, pixels)
        columns = patches.transpose(0, 1, 4, 5, 2, 3).reshape(count, groups, -1, height * width)
        rows = weights.reshape(groups, len(weights) // groups, -1)
        return _product(rows, columns).reshape(count, len(weights), height, width)

    def _linear(self, operation: dict[str, Any], x: Any) -> Any:
        return _product(self.weights[operation["weight"]], x[..., None])[..., 0]

    def _combine(self, operation: dict[str, Any], *inputs: Any) -> Any:
        axes = (1, -1, *(1,) * (inputs[0].ndim - 2))
        total = self.stored[operation["offset"]].reshape(axes)
        for x, name in zip(inputs, operation["multipliers"], strict=True):
            total = total + x * self.stored[name].reshape(axes)
        shift = operation["shift"]
        levels = total >> shift
        rest, half = total - (levels << shift), 1 << (shift - 1)
        levels = levels + ((rest > half) | ((rest == half) & (levels & 1 == 1)))
        return levels if operation["low"] is None else levels.clip(operation["low"], operation["high"])

    def _relu(self, operation: dict[str, Any], x: Any) -> Any:
        return x.clip(0)

    def _max_pool(self, operation: dict[str, Any], x: Any) -> Any:
        return _windows(operation, x, _LOWEST).max((-2, -1))

    def _sum_pool(self, operation: dict[str, Any], x: Any) -> Any:
        return _windows(operation, x, 0).sum((-2, -1))

    def _global_sum(self, operation: dict[str, Any], x: Any) -> Any:
        return x.sum((2, 3), keepdims=len(operation["shape"]) == 3)

    def _flatten(self, operation: dict[str, Any], x: Any) -> Any:
        return x.reshape(len(x), *operation["shape"])

    def _concat(self, operation: dict[str, Any], *inputs: Any) -> Any:
        return np.concatenate(inputs, axis=1)

    def _pad(self, operation: dict[str, Any], x: Any) -> Any:
        pads = operation["pads"]
        return np.pad(x, ((0, 0), *zip(pads[:3], pads[3:], strict=True)))

    def _slice(self, operation: dict[str, Any], x: Any) -> Any:
        ranges = zip(operation["starts"], operation["ends"], operation["steps"], strict=True)
        return x[(slice(None), *(slice(start, end, step) for start, end, step in ranges))]


def _product(rows: Any, columns: Any) -> Any:
    """Return the exact product of integers: floats of 64 bit hold every integer up to 2^53, and multiply faster."""
    return (rows.astype(np.float64) @ columns.astype(np.float64)).astype(np.int64)


def _windows(operation: dict[str, Any], x: Any, fill: int) -> Any:
    top, left, bottom, right = operation["pads"]
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    rows, columns = operation["strides"]
    windows = np.lib.stride_tricks.sliding_window_view(x, operation["kernel"], axis=(2, 3))
    return windows[:, :, ::rows, ::columns]


def unpack(packed: Any, bits: int, shape: list[int]) -> Any:
    """Return integers of some bits, two's complement and the lowest bit first, packed into bytes without gaps."""
    count = int(np.prod(shape))
    planes = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits).astype(np.int64)
    values = (planes << np.arange(bits)).sum(1)
    return np.where(values >= 1 << (bits - 1), values - (1 << bits), values).reshape(shape)


def read_safetensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file: the length of the header in 8 bytes, the header in JSON, the data."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found: dict[str, Any] = {}
    for name, facts in json.loads(data[8:start]).items():
        if name != "__metadata__":
            low, high = (start + offset for offset in facts["data_offsets"])
            found[name] = np.frombuffer(data[low:high], _TYPES[facts["dtype"]]).reshape(facts["shape"])
    return found
