"""From a QONNX graph to a program of integer operations; what has none is refused by name."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from qadtr_brevitas.core.errors import ExportError
from qadtr_brevitas.exporting.graph import attribute, bits_of, layer_of
from qadtr_brevitas.exporting.integer_values import Array, Program, Term, Value
from qadtr_brevitas.exporting.pads import padding_of
from qadtr_brevitas.exporting.rewrite import PIXELS, is_ceiled

INPUT = "images"
_PASSING = ("Identity", "Dropout")
_SHAPES = ("Flatten", "Reshape", "Squeeze")
_POOLS = ("GlobalAveragePool", "ReduceMean")
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div")


class Translation:
    """Translates the nodes of a graph, in order.

    Args:
        model: a qonnx ModelWrapper for one image, with all shapes, the names that PyTorch gave, and constants folded.

    Raises:
        ExportError: a node has no integer operation; the message names its layer.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.program = model, Program()
        given, wanted = model.graph.input[0].name, model.graph.output[0].name
        shape = tuple(model.get_tensor_shape(given)[1:])
        self.program.bounds[INPUT] = int(PIXELS)
        self.values = {given: Value((Term(INPUT, np.array([1 / PIXELS])),), np.zeros(1), shape)}
        self.shape = shape
        # Names of weights in the file, by their names in the graph.
        self.names: dict[str, str] = {}
        for node in model.graph.node:
            if any(name in self.values for name in node.input):
                self.values[node.output[0]] = self._translated(node)
        value = self.values[wanted]
        # Logits keep what the steps of their weights can tell apart.
        step = min(float(abs(term.scale).max()) for term in value.terms) / 2**8
        self.output = self.program.combine("logits", value, step, None)

    def _translated(self, node: Any) -> Value:
        kind = node.op_type
        if kind in _PASSING:
            return self.values[node.input[0]]
        name = {"Gemm": "linear", "BatchNormalization": "norm"}.get(kind, kind.lower())
        name = "elementwise" if kind in _ELEMENTWISE else "mean" if kind in _POOLS else name
        translate = getattr(self, f"_{'flatten' if kind in _SHAPES else name}", None)
        if translate is None:
            raise _refused(node, f"computes {kind}, for which integers have no operation here")
        return translate(node)

    def _constant(self, name: str) -> Array | None:
        value = self.model.get_initializer(name)
        return None if value is None else np.asarray(value, dtype=np.float64)

    def _quant(self, node: Any) -> Value:
        value = self.values[node.input[0]]
        step, zero = (self._constant(name) for name in node.input[1:3])
        if step is None or step.size > 1 or zero is None or zero.any():
            raise _refused(node, "quantizes activations with other than one fixed step around 0")
        bits, signed = bits_of(self.model, node), bool(attribute(node, "signed", 1))
        limits = _limits(bits, signed=signed, narrow=bool(attribute(node, "narrow", 0)))
        found = self.program.combine(layer_of(node), value, float(step.reshape(())), limits)
        facts = {"scale": float(step.reshape(())), "zero_point": 0, "bits": bits, "signed": signed}
        self.program.levels[found.terms[0].tensor] = facts
        return found

    def _conv(self, node: Any) -> Value:
        value, weights, steps = self._product(node)
        if weights.ndim != 4:
            raise _refused(node, "convolves something else than images")
        facts: dict[str, Any] = {
            "strides": list(attribute(node, "strides", [1, 1])),
            "pads": padding_of(node),
            "dilations": list(attribute(node, "dilations", [1, 1])),
            "groups": attribute(node, "group", 1),
        }
        return self._products("conv", node, value, weights, steps, facts)

    def _linear(self, node: Any) -> Value:
        value, weights, steps = self._product(node)
        factors = (attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0), attribute(node, "transA", 0))
        if factors != (1.0, 1.0, 0) or len(value.shape) != 1 or not attribute(node, "transB", 0):
            raise _refused(node, "is a matrix product, but no linear layer")
        return self._products("linear", node, value, weights, steps, {})

    def _matmul(self, node: Any) -> Value:
        """A linear layer without bias, as PyTorch writes it: x @ weight.T."""
        turn = self.model.find_producer(node.input[1])
        if turn is None or turn.op_type != "Transpose" or list(attribute(turn, "perm", [1, 0])) != [1, 0]:
            raise _refused(node, "is a matrix product, but no linear layer")
        value, weights, steps = self._product(node, turn.input[0])
        if len(value.shape) != 1:
            raise _refused(node, "is a linear layer for each of several tokens")
        return self._products("linear", node, value, weights, steps, {})

    def _product(self, node: Any, weight: str = "") -> tuple[Value, Array, Array]:
        """Return what a layer reads, its weights in integers and their steps, (out,).

        Args:
            node: the layer.
            weight: name of its weights, (out, in, ...), where it does not read them itself.
        """
        value, quant = self.values.get(node.input[0]), self.model.find_producer(weight or node.input[1])
        if value is None or not value.is_levels:
            raise _refused(node, "computes on activations that are not quantized")
        weights = None if quant is None or quant.op_type != "Quant" else self._constant(quant.input[0])
        if quant is None or weights is None:
            raise _refused(node, "has weights that are not quantized")
        step, zero = (self._constant(name) for name in quant.input[1:3])
        if step is None or zero is None or zero.any():
            raise _refused(node, "has weights with a zero point")
        bits = bits_of(self.model, quant)
        limits = _limits(bits, signed=True, narrow=bool(attribute(quant, "narrow", 0)))
        # In 32 bits, as the network does, so that a weight between two levels falls to the same side.
        levels = np.rint(weights.astype(np.float32) / step.astype(np.float32)).astype(np.int64).clip(*limits)
        steps = np.broadcast_to(step.reshape(-1), (len(levels),)).copy()
        self._keep_weight(node, levels, steps, bits)
        return value, levels, steps

    def _keep_weight(self, node: Any, levels: Array, steps: Array, bits: int) -> None:
        """Keep the packed weight of a layer, once where several nodes read it."""
        if node.input[1] in self.names:
            return
        name = f"{layer_of(node)}.weight"
        while name in self.program.weights:
            name += "_"
        self.names[node.input[1]] = name
        scale = f"{name.replace('.weight', '.scale')}"
        self.program.tensors |= {name: pack(levels, bits), scale: steps}
        self.program.weights[name] = {"bits": bits, "shape": list(levels.shape), "scale": scale, "zero_point": 0}

    def _products(
        self, kind: str, node: Any, value: Value, weights: Array, steps: Array, facts: dict[str, Any]
    ) -> Value:
        bias = self._constant(node.input[2]) if len(node.input) > 2 else np.zeros(1)
        if bias is None:
            raise _refused(node, "has a bias that is computed")
        (term,) = value.terms
        bound = int(abs(weights).reshape(len(weights), -1).sum(1).max()) * self.program.bounds[term.tensor]
        if bound >= 2**53:
            raise _refused(node, "has sums beyond 2^53")
        layer, shape = layer_of(node), self._shape(node)
        weight = self.names[node.input[1]]
        output = self.program.add(kind, layer, [term.tensor], shape, bound, weight=weight, **facts)
        # Levels have one step, which other channels may have been joined to.
        return Value((Term(output, term.scale[:1] * steps),), bias, shape)

    def _shape(self, node: Any) -> tuple[int, ...]:
        return tuple(self.model.get_tensor_shape(node.output[0])[1:])

    def _norm(self, node: Any) -> Value:
        gamma, beta, mean, var = (self._constant(name) for name in node.input[1:5])
        if gamma is None or beta is None or mean is None or var is None:
            raise _refused(node, "normalizes by what it computes from each image")
        factor = gamma / np.sqrt(var + attribute(node, "epsilon", 1e-5))
        return self.values[node.input[0]].times(factor).plus(beta - mean * factor)

    def _elementwise(self, node: Any) -> Value:
        kind = node.op_type
        left, right = (self.values.get(name) for name in node.input)
        if left is None or right is None:
            return self._with_constant(node, kind)
        if kind not in ("Add", "Sub") or left.shape != right.shape:
            raise _refused(node, f"computes {kind} of two activations, for which integers have no operation here")
        right = right if kind == "Add" else right.times(-1.0)
        return Value((*left.terms, *right.terms), left.offset + right.offset, left.shape)

    def _with_constant(self, node: Any, kind: str) -> Value:
        first = node.input[0] in self.values
        value = self.values[node.input[0 if first else 1]]
        constant = self._per_channel(node, node.input[1 if first else 0], value)
        if kind == "Add":
            return value.plus(constant)
        if kind == "Sub":
            return value.plus(-constant) if first else value.times(-1.0).plus(constant)
        if kind == "Div" and not first:
            raise _refused(node, "divides by activations")
        return value.times(constant if kind == "Mul" else 1 / constant)

    def _per_channel(self, node: Any, name: str, value: Value) -> Array:
        """Return a constant that elementwise operations combine with a value, as one per channel, (C,) or (1,)."""
        constant = self._constant(name)
        if constant is None:
            raise _refused(node, f"computes {node.op_type} with weights that are quantized")
        shape = constant.shape[max(0, constant.ndim - len(value.shape)) :]
        shape = (*(1,) * (len(value.shape) - len(shape)), *shape)
        if prod(shape) != constant.size or any(side != 1 for side in shape[1:]):
            raise _refused(node, f"computes {node.op_type} with a constant for each pixel")
        return constant.reshape(-1)

    def _relu(self, node: Any) -> Value:
        value = self.values[node.input[0]]
        readers = self.model.find_consumers(node.output[0])
        if readers and all(reader.op_type == "Quant" and not attribute(reader, "signed", 1) for reader in readers):
            # Unsigned levels begin at 0.
            return value
        value = self.program.single(layer_of(node), value)
        return self.program.each("relu", layer_of(node), value, value.shape)

    def _maxpool(self, node: Any) -> Value:
        if is_ceiled(self.model, node) or max(attribute(node, "dilations", [1])) > 1:
            raise _refused(node, "is a max pool with dilation, or over fewer pixels at the border (ceil_mode)")
        value = self.values[node.input[0]]
        value = value if value.is_single else self.program.single(layer_of(node), value)
        return self.program.each("max-pool", layer_of(node), value, self._shape(node), **_window(node))

    def _averagepool(self, node: Any) -> Value:
        value, padded = self.values[node.input[0]], any(attribute(node, "pads", [0]))
        if is_ceiled(self.model, node) or (padded and not attribute(node, "count_include_pad", 0)):
            raise _refused(node, "averages over fewer pixels at the border")
        if padded and value.offset.any():
            value = self.program.single(layer_of(node), value)
        facts = _window(node)
        pixels = prod(facts["kernel"])
        found = self.program.each("sum-pool", layer_of(node), value, self._shape(node), pixels, **facts)
        return _averaged(found, value, pixels)

    def _mean(self, node: Any) -> Value:
        value = self.values[node.input[0]]
        rank = len(value.shape) + 1
        axes = attribute(node, "axes", [2, 3])
        if rank != 4 or sorted(axis % rank for axis in axes) != [2, 3]:
            raise _refused(node, "is a mean that is no pool over pixels")
        pixels = prod(value.shape[1:])
        found = self.program.each("global-sum", layer_of(node), value, self._shape(node), pixels)
        return _averaged(found, value, pixels)

    def _flatten(self, node: Any) -> Value:
        value, shape = self.values[node.input[0]], self._shape(node)
        if len(shape) != 1 or prod(shape) != prod(value.shape):
            raise _refused(node, f"changes the shape {value.shape} to {shape}, for which there is no operation here")
        if shape == value.shape:
            return value
        pixels = prod(value.shape[1:])
        terms = tuple(replace(term, scale=_repeated(term.scale, pixels)) for term in value.terms)
        value = replace(value, terms=terms, offset=_repeated(value.offset, pixels))
        return self.program.each("flatten", layer_of(node), value, shape)

    def _concat(self, node: Any) -> Value:
        shape = self._shape(node)
        if any(name not in self.values for name in node.input) or attribute(node, "axis") % (len(shape) + 1) != 1:
            raise _refused(node, "joins other things than channels of activations")
        layer = layer_of(node)
        values = [self.values[name] for name in node.input]
        values = [value if len(value.terms) == 1 else self.program.single(layer, value) for value in values]
        tensors = [value.terms[0].tensor for value in values]
        output = self.program.add("concat", layer, tensors, shape, max(self.program.bounds[name] for name in tensors))
        scale = np.concatenate([np.broadcast_to(value.terms[0].scale, value.shape[:1]) for value in values])
        offset = np.concatenate([np.broadcast_to(value.offset, value.shape[:1]) for value in values])
        return Value((Term(output, scale),), offset, shape)

    def _pad(self, node: Any) -> Value:
        value = self.values[node.input[0]]
        pads = self._constant(node.input[1])
        fill = self._constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        if attribute(node, "mode", b"constant") != b"constant" or pads is None or fill is None or fill.any():
            raise _refused(node, "pads with something else than zeros")
        pads = [int(pad) for pad in pads]
        rank = len(value.shape) + 1
        before, after = pads[1:rank], pads[rank + 1 :]
        if rank != 4 or min(pads) < 0 or pads[0] or pads[rank]:
            raise _refused(node, "pads something else than images")
        if value.offset.any() and any(before[1:] + after[1:]):
            value = self.program.single(layer_of(node), value)
        if before[0] or after[0]:
            wide = [np.broadcast_to(term.scale, value.shape[:1]) for term in value.terms]
            wide = [np.pad(scale, (before[0], after[0]), mode="edge") for scale in wide]
            terms = tuple(replace(term, scale=scale) for term, scale in zip(value.terms, wide, strict=True))
            offset = np.pad(np.broadcast_to(value.offset, value.shape[:1]), (before[0], after[0]))
            value = replace(value, terms=terms, offset=offset)
        return self.program.each("pad", layer_of(node), value, self._shape(node), pads=[*before, *after])

    def _slice(self, node: Any) -> Value:
        value = self.values[node.input[0]]
        given = [self._constant(name) for name in node.input[1:]]
        if any(part is None for part in given):
            raise _refused(node, "cuts out what depends on the image")
        parts = [[int(number) for number in part] for part in given if part is not None]
        rank = len(value.shape) + 1
        axes = parts[2] if len(parts) > 2 else list(range(len(parts[0])))
        steps = parts[3] if len(parts) > 3 else [1] * len(parts[0])
        cuts = {a % rank: slice(s, e, t) for s, e, a, t in zip(parts[0], parts[1], axes, steps, strict=True)}
        if 0 in cuts or any(cut.step < 0 for cut in cuts.values()):
            raise _refused(node, "cuts images out of a batch, or turns them over")
        ranges = [cuts.get(axis + 1, slice(None)).indices(side) for axis, side in enumerate(value.shape)]
        starts, ends, strides = (list(part) for part in zip(*ranges, strict=True))
        channels = slice(*ranges[0])
        terms = tuple(replace(term, scale=_cut(term.scale, channels)) for term in value.terms)
        value = replace(value, terms=terms, offset=_cut(value.offset, channels))
        return self.program.each(
            "slice", layer_of(node), value, self._shape(node), starts=starts, ends=ends, steps=strides
        )


def _limits(bits: int, *, signed: bool, narrow: bool) -> tuple[int, int]:
    if not signed:
        return 0, 2**bits - 1 - narrow
    return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1


def _window(node: Any) -> dict[str, Any]:
    kernel = list(attribute(node, "kernel_shape"))
    return {
        "kernel": kernel,
        "strides": list(attribute(node, "strides", [1, 1])),
        "pads": list(attribute(node, "pads", [0] * 4)),
    }


def _averaged(total: Value, value: Value, pixels: int) -> Value:
    """Return the mean over pixels of a value whose tensors were summed."""
    terms = tuple(replace(term, scale=term.scale / pixels) for term in total.terms)
    return replace(total, terms=terms, offset=value.offset)


def _repeated(array: Array, count: int) -> Array:
    return array if len(array) == 1 else np.repeat(array, count)


def _cut(array: Array, channels: slice) -> Array:
    return array if len(array) == 1 else array[channels]


def pack(levels: Array, bits: int) -> Array:
    """Pack integers into bytes without gaps, two's complement and the lowest bit first: ceil(n * bits / 8) bytes."""
    planes = (levels.reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(planes.astype(np.uint8).reshape(-1), bitorder="little")


def _refused(node: Any, what: str) -> ExportError:
    return ExportError(f"integers: {layer_of(node)} {what}; export to qcdq or qonnx instead")
