"""Borders of zeros become the padding of the convolutions that read them.

Networks that come from TensorFlow pad images themselves, unevenly where a stride is even, and FPGA compilers and
integer kernels know no such node. Quantizers have 0 among their levels, so that a border stays zeros behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qadtr_brevitas.exporting.constants import infer_shapes, remove_unread
from qadtr_brevitas.exporting.graph import attribute, library

# The constants of a graph, by their names; and what a pixel becomes that was 0, None if that is not known.
_Fixed = Mapping[str, Any]
_Pixel = Any


def merge_pads(model: Any) -> Any:
    """Let convolutions pad with the zeros that Pads put around what they read, in place; return the model.

    Pads of channels, of a batch, with negative sizes, with other values or whose result something else reads stay.

    Args:
        model: an ONNX ModelProto of standard operators and quantizers, with constants folded.
    """
    graph = model.graph
    # From the last one on: a Pad may be behind another.
    pads = [node for node in reversed(graph.node) if node.op_type == "Pad"]
    if pads:
        to_array = library("onnx").numpy_helper.to_array
        fixed = {tensor.name: to_array(tensor) for tensor in graph.initializer}
        for pad in pads:
            _merge(graph, pad, fixed)
        remove_unread(graph)
        infer_shapes(model)
    return model


def padding_of(conv: Any) -> list[int]:
    """Return by how many pixels a convolution pads, first before each axis and then behind: [top, left, bottom, right].

    Args:
        conv: a node whose stride is 1 where it pads "same", as PyTorch has it.
    """
    kernel = attribute(conv, "kernel_shape")
    if attribute(conv, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID"):
        return list(attribute(conv, "pads", [0] * 2 * len(kernel)))
    dilations = attribute(conv, "dilations", [1] * len(kernel))
    total = [dilation * (side - 1) for dilation, side in zip(dilations, kernel, strict=True)]
    before = [pixels // 2 for pixels in total]
    return [*before, *(pixels - half for pixels, half in zip(total, before, strict=True))]


def set_padding(conv: Any, pads: list[int]) -> None:
    """Write the padding of a convolution as numbers of pixels."""
    for old in [found for found in conv.attribute if found.name in ("pads", "auto_pad")]:
        conv.attribute.remove(old)
    conv.attribute.append(library("onnx").helper.make_attribute("pads", pads))


def _merge(graph: Any, pad: Any, fixed: _Fixed) -> None:
    """Merge one Pad if that is exact."""
    border = _zeros_around(pad, fixed)
    convs = None if border is None else _readers(graph, pad.output[0], np.zeros(1, np.float32), fixed)
    if border is None or convs is None or any(len(padding_of(conv)) != len(border) for conv in convs):
        return
    for conv in convs:
        set_padding(conv, [own + more for own, more in zip(padding_of(conv), border, strict=True)])
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == pad.output[0]:
                node.input[index] = pad.input[0]
    graph.node.remove(pad)


def _zeros_around(pad: Any, fixed: _Fixed) -> list[int] | None:
    """Return how many zeros a Pad puts around images, as `padding_of` has them; None for another kind of Pad."""
    given = [*pad.input, "", ""]
    sizes, value = fixed.get(given[1]), fixed.get(given[2]) if given[2] else np.zeros(1)
    if sizes is None or value is None or given[3] or attribute(pad, "mode", b"constant") != b"constant":
        return None
    before, behind = np.split(sizes, 2)
    if np.any(value) or (sizes < 0).any() or before[:2].any() or behind[:2].any():
        return None
    return [int(pixels) for pixels in (*before[2:], *behind[2:])]


def _readers(graph: Any, name: str, pixel: _Pixel, fixed: _Fixed) -> list[Any] | None:
    """Return the convolutions that a border reaches as zeros; None if it reaches anything else.

    Args:
        graph: the graph.
        name: of a tensor.
        pixel: what its border consists of.
        fixed: the constants.
    """
    found: list[Any] = []
    if name in {output.name for output in graph.output}:
        return None
    for node in [node for node in graph.node if name in node.input]:
        if node.op_type == "Conv" and name not in node.input[1:] and not np.any(pixel):
            found.append(node)
            continue
        become = _PIXELWISE.get(node.op_type)
        behind = None if become is None or name in node.input[1:] else become(node, pixel, fixed)
        convs = None if behind is None else _readers(graph, node.output[0], behind, fixed)
        if convs is None:
            return None
        found += convs
    return found


def _after_relu(node: Any, pixel: _Pixel, fixed: _Fixed) -> _Pixel:
    return np.maximum(pixel, 0)


def _after_clip(node: Any, pixel: _Pixel, fixed: _Fixed) -> _Pixel:
    bounds = [fixed.get(name) for name in node.input[1:] if name]
    if len(bounds) != 2 or any(bound is None for bound in bounds):
        return None
    return np.clip(pixel, *bounds)


def _after_quantize(node: Any, pixel: _Pixel, fixed: _Fixed) -> _Pixel:
    if np.any(pixel):
        return None
    return fixed.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1, np.uint8)


def _after_dequantize(node: Any, pixel: _Pixel, fixed: _Fixed) -> _Pixel:
    step = fixed.get(node.input[1])
    zero = fixed.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    return None if step is None or zero is None else (pixel.astype(np.float64) - zero) * step


def _after_quant(node: Any, pixel: _Pixel, fixed: _Fixed) -> _Pixel:
    step, zero, bits = (fixed.get(name) for name in node.input[1:4])
    if step is None or zero is None or bits is None or np.any(pixel):
        return None
    signed, narrow = attribute(node, "signed", 1), attribute(node, "narrow", 0)
    low = -(2.0 ** (bits - 1)) + narrow if signed else 0 * bits
    high = 2.0 ** (bits - 1) - 1 if signed else 2.0**bits - 1 - narrow
    return (np.rint(np.clip(zero, low, high)) - zero) * step


_PIXELWISE: dict[str, Callable[[Any, _Pixel, _Fixed], _Pixel]] = {
    "Relu": _after_relu,
    "Clip": _after_clip,
    "QuantizeLinear": _after_quantize,
    "DequantizeLinear": _after_dequantize,
    "Quant": _after_quant,
}
