"""A network in integers as one C99 header without dependencies: to check a port against, or to run as it is.

    #define QN_IMPLEMENTATION
    #include "model.h"
    int32_t logits[QN_CLASSES];
    int class = qn_classify(image, logits);           // image: uint8_t of channels, rows, columns

Weights are bytes (two where they have more than 8 bit), all other values 32 bit; tensors that are read no more leave
their memory to later ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from qadtr_brevitas.exporting.deployed.integers import IntegerNetwork

# Weights of the largest network that a header is written for.
LARGEST_WEIGHTS = 1 << 20
_INT32, _INT8 = 32, 8
_PER_LINE = 24

_FUNCTIONS = """\
static inline int64_t qn_round(int64_t total, int shift) {
  int64_t level = total >> shift, rest = total - level * ((int64_t)1 << shift), half = (int64_t)1 << (shift - 1);
  return level + (rest > half || (rest == half && (level & 1)));
}
#define QN_PRODUCT(NAME, TYPE)                                                                                        \\
  static inline void NAME(const int32_t *x, const TYPE *w, int32_t *y, int channels, int height, int width, int outs, \\
                          int rows, int cols, int kh, int kw, int sh, int sw, int top, int left, int dh, int dw,      \\
                          int groups) {                                                                               \\
    int ins = channels / groups, part = outs / groups;                                                                \\
    for (int o = 0; o < outs; o++)                                                                                    \\
      for (int r = 0; r < rows; r++)                                                                                  \\
        for (int c = 0; c < cols; c++) {                                                                              \\
          int32_t sum = 0;                                                                                            \\
          for (int i = 0; i < ins; i++)                                                                               \\
            for (int a = 0; a < kh; a++)                                                                              \\
              for (int b = 0; b < kw; b++) {                                                                          \\
                int row = r * sh - top + a * dh, col = c * sw - left + b * dw;                                        \\
                if (row >= 0 && row < height && col >= 0 && col < width)                                              \\
                  sum += x[(((o / part) * ins + i) * height + row) * width + col] *                                   \\
                         (int32_t)w[((o * ins + i) * kh + a) * kw + b];                                               \\
              }                                                                                                       \\
          y[(o * rows + r) * cols + c] = sum;                                                                         \\
        }                                                                                                             \\
  }
QN_PRODUCT(qn_conv8, int8_t)
QN_PRODUCT(qn_conv16, int16_t)
static inline void qn_pool(const int32_t *x, int32_t *y, int channels, int height, int width, int rows, int cols,
                           int kh, int kw, int sh, int sw, int top, int left, int is_max) {
  for (int k = 0; k < channels; k++)
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < cols; c++) {
        int32_t found = is_max ? INT32_MIN : 0;
        for (int a = 0; a < kh; a++)
          for (int b = 0; b < kw; b++) {
            int row = r * sh - top + a, col = c * sw - left + b;
            if (row < 0 || row >= height || col < 0 || col >= width) continue;
            int32_t value = x[(k * height + row) * width + col];
            found = is_max ? (value > found ? value : found) : found + value;
          }
        y[(k * rows + r) * cols + c] = found;
      }
}
"""


def write_header(network: IntegerNetwork, path: Path) -> bool:
    """Write the header of a network; False, and nothing written, where a tensor needs more than 32 bits."""
    operations = network.graph["operations"]
    if any(operation["bits"] > _INT32 for operation in operations):
        return False
    path.write_text("\n".join(_lines(network)) + "\n", encoding="utf-8")
    return True


def _lines(network: IntegerNetwork) -> Iterator[str]:
    graph = network.graph
    shapes = {op["output"]: op["shape"] for op in graph["operations"]} | {"images": graph["input"]["shape"]}
    places, sizes = _places(graph, shapes)
    yield "/* Written by qadtr-brevitas: see model.json. In one source file, define QN_IMPLEMENTATION before it. */"
    yield "#ifndef QN_MODEL_H\n#define QN_MODEL_H\n#include <stdint.h>"
    yield f"#define QN_INPUTS {prod(graph['input']['shape'])}"
    yield f"#define QN_CLASSES {prod(graph['output']['shape'])}"
    yield f"#define QN_STEP {graph['output']['step']!r} /* a logit is its integer times this */"
    yield "int qn_classify(const uint8_t *image, int32_t *logits);\n#endif"
    yield "#ifdef QN_IMPLEMENTATION"
    yield _FUNCTIONS
    for name, values in network.weights.items():
        kind = "int8_t" if _is_narrow(network, name) else "int16_t"
        yield _array(kind, _identifier(name), values)
    for op in (op for op in graph["operations"] if op["operation"] == "combine"):
        for name in (*op["multipliers"], op["offset"]):
            yield _array("int64_t", _identifier(name), network.stored[name])
    for place, size in enumerate(sizes):
        yield f"static int32_t qn_b{place}[{size}];"
    yield "int qn_classify(const uint8_t *image, int32_t *logits) {"
    yield f"  for (int i = 0; i < QN_INPUTS; i++) qn_b{places['images']}[i] = image[i];"
    for op in graph["operations"]:
        inputs = [f"qn_b{places[name]}" for name in op["inputs"]]
        kept = [shapes[name] for name in op["inputs"]]
        yield f"  /* {op['output']}: {op['operation']} of {op['layer']} */"
        yield from (f"  {line}" for line in _call(network, op, inputs, kept, f"qn_b{places[op['output']]}"))
    yield f"  const int32_t *found = qn_b{places[graph['output']['tensor']]};"
    yield "  int best = 0;\n  for (int i = 0; i < QN_CLASSES; i++) {\n    logits[i] = found[i];"
    yield "    if (found[i] > found[best]) best = i;\n  }\n  return best;\n}\n#endif"


def _places(graph: dict[str, Any], shapes: dict[str, list[int]]) -> tuple[dict[str, int], list[int]]:
    """Return the buffer of each tensor and the sizes of the buffers; one that is read no more is used again."""
    last = {name: index for index, op in enumerate(graph["operations"]) for name in op["inputs"]}
    last[graph["output"]["tensor"]] = len(graph["operations"])
    places, sizes, free = {"images": 0}, [prod(shapes["images"])], [False]
    for index, op in enumerate(graph["operations"]):
        name, wanted = op["output"], prod(op["shape"])
        fitting = [place for place, is_free in enumerate(free) if is_free]
        place = min(fitting, key=lambda place: abs(sizes[place] - wanted), default=len(sizes))
        if place == len(sizes):
            sizes.append(0)
            free.append(False)
        places[name], sizes[place], free[place] = place, max(sizes[place], wanted), False
        for read in {*op["inputs"], name}:
            free[places[read]] = free[places[read]] or last.get(read, index) <= index
    return places, sizes


def _call(
    network: IntegerNetwork, op: dict[str, Any], inputs: list[str], shapes: list[list[int]], output: str
) -> Iterator[str]:
    kind, count, first = op["operation"], prod(op["shape"]), inputs[0]
    channels, height, width = _image(shapes[0])
    outs, rows, cols = _image(op["shape"])
    if kind in ("conv", "linear"):
        weight = op["weight"]
        kernel = network.weights[weight].shape[2:] or (1, 1)
        numbers = [*kernel, *op.get("strides", (1, 1)), *op.get("pads", (0, 0))[:2], *op.get("dilations", (1, 1))]
        sizes = [channels, height, width, outs, rows, cols, *numbers, op.get("groups", 1)]
        bits = _INT8 if _is_narrow(network, weight) else 16
        yield f"qn_conv{bits}({first}, {_identifier(weight)}, {output}, {', '.join(map(str, sizes))});"
    elif kind == "combine":
        yield from _combine(network, op, inputs, count, rows * cols, output)
    elif kind in ("max-pool", "sum-pool", "global-sum"):
        numbers = [*op.get("kernel", (height, width)), *op.get("strides", (1, 1)), *op.get("pads", (0, 0))[:2]]
        sizes = [channels, height, width, rows, cols, *numbers, int(kind == "max-pool")]
        yield f"qn_pool({first}, {output}, {', '.join(map(str, sizes))});"
    elif kind == "relu":
        yield f"for (int i = 0; i < {count}; i++) {output}[i] = {first}[i] > 0 ? {first}[i] : 0;"
    elif kind == "flatten":
        yield f"for (int i = 0; i < {count}; i++) {output}[i] = {first}[i];"
    elif kind == "concat":
        start = 0
        for name, shape in zip(inputs, shapes, strict=True):
            yield f"for (int i = 0; i < {prod(shape)}; i++) {output}[{start} + i] = {name}[i];"
            start += prod(shape)
    else:
        yield from _moved(op, first, shapes[0], output)


def _combine(
    network: IntegerNetwork, op: dict[str, Any], inputs: list[str], count: int, pixels: int, output: str
) -> Iterator[str]:
    def each(name: str) -> str:
        return f"{_identifier(name)}[{'0' if network.stored[name].size == 1 else f'i / {pixels}'}]"

    terms = "".join(f" + {x}[i] * {each(name)}" for x, name in zip(inputs, op["multipliers"], strict=True))
    yield f"for (int i = 0; i < {count}; i++) {{"
    yield f"  int64_t level = qn_round({each(op['offset'])}{terms}, {op['shift']});"
    if op["low"] is not None:
        yield f"  level = level < {op['low']} ? {op['low']} : level > {op['high']} ? {op['high']} : level;"
    yield f"  {output}[i] = (int32_t)level;"
    yield "}"


def _moved(op: dict[str, Any], first: str, shape: list[int], output: str) -> Iterator[str]:
    """Yield the loop of `pad` and `slice`, each value of the output being one of the input, or 0."""
    channels, height, width = _image(shape)
    _, rows, cols = _image(op["shape"])
    starts = op["starts"] if op["operation"] == "slice" else [-pad for pad in op["pads"][:3]]
    steps = op["steps"] if op["operation"] == "slice" else [1, 1, 1]
    starts, steps = ([*values, *(0, 0)][:3] for values in (starts, [*steps, 1, 1]))
    yield f"for (int i = 0; i < {prod(op['shape'])}; i++) {{"
    yield f"  int k = i / {rows * cols} * {steps[0]} + {starts[0]}, r = i / {cols} % {rows} * {steps[1]} + {starts[1]},"
    yield f"      c = i % {cols} * {steps[2]} + {starts[2]};"
    yield f"  int inside = k >= 0 && k < {channels} && r >= 0 && r < {height} && c >= 0 && c < {width};"
    yield f"  {output}[i] = inside ? {first}[(k * {height} + r) * {width} + c] : 0;"
    yield "}"


def _image(shape: list[int]) -> tuple[int, int, int]:
    channels, height, width = [*shape, 1, 1][:3]
    return channels, height, width


def _is_narrow(network: IntegerNetwork, name: str) -> bool:
    return network.graph["weights"][name]["bits"] <= _INT8


def _identifier(name: str) -> str:
    return "qn_" + "".join(letter if letter.isalnum() else "_" for letter in name)


def _array(kind: str, name: str, values: Any) -> str:
    suffix = "LL" if kind == "int64_t" else ""
    numbers = [f"{value}{suffix}" for value in np.asarray(values).reshape(-1).tolist()]
    lines = [", ".join(numbers[start : start + _PER_LINE]) for start in range(0, len(numbers), _PER_LINE)]
    return f"static const {kind} {name}[{len(numbers)}] = {{\n" + ",\n".join(lines) + "\n};"
