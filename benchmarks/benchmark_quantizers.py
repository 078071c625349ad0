"""What does quantizing one tensor take, forward and backward, eagerly and by fused kernels?

    python -m benchmarks.benchmark_quantizers
    python -m benchmarks.benchmark_quantizers --threads 2 --rounds 25

Values are 4-bit activations with one step and weights with one for each output channel. `formula` is the chain of
PyTorch operations that the learned-step gradient is written in (`quantize_by`), for comparison. Times are medians of
interleaved calls: processor milliseconds with one thread, wall milliseconds with more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from qadtr_brevitas.core.device import keep_freed_memory
from qadtr_brevitas.quant.fake_quantize import quantize_activation, quantize_by
from qadtr_brevitas.quant.fused import fused_on_cpu
from qadtr_brevitas.quant.quantize_weight import quantize_weight

LO, HI = -8, 7
ACTIVATIONS = [(128, 16, 32, 32), (16, 64, 56, 56)]
WEIGHTS = [(512, 512, 3, 3), (2048, 512, 1, 1), (1536, 384), (64, 64, 3, 3)]

Quantize = Callable[[Tensor, Tensor], Tensor]


def formula(x: Tensor, step: Tensor) -> Tensor:
    return quantize_by(lambda levels: levels.round().clamp(LO, HI), x, step, low=LO, high=HI)


def activation(x: Tensor, step: Tensor) -> Tensor:
    return quantize_activation(x, step, LO, HI)


def weight(x: Tensor, step: Tensor) -> Tensor:
    return quantize_weight(x, step, LO, HI)


def one_call(quantize: Quantize, x: Tensor, step: Tensor, g: Tensor, clock: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds of a forward and a backward pass."""
    start = clock()
    y = quantize(x, step)
    middle = clock()
    torch.autograd.grad(y, (x, step), g)
    return middle - start, clock() - middle


def measure(shape: tuple[int, ...], own: Quantize, steps: int, given: argparse.Namespace) -> dict[str, list[float]]:
    """Return the median milliseconds of forward and backward passes by form."""
    draws = torch.Generator().manual_seed(0)
    x, g = (_laid_out(torch.randn(shape, generator=draws)) for _ in "xg")
    step = torch.full((steps, *(1,) * (len(shape) - 1)), 0.3).requires_grad_()
    clock = time.process_time if given.threads == 1 else time.perf_counter
    forms = {"formula": (formula, nullcontext), "eager": (own, nullcontext), "fused": (own, fused_on_cpu)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for number in range(given.rounds + 2):
        for name, (quantize, context) in forms.items():
            with context():
                found = one_call(quantize, x.requires_grad_(), step, g, clock)
            # The first calls compile.
            if number >= 2:
                times[name].append(found)
    return {name: [1e3 * statistics.median(part) for part in zip(*found, strict=True)] for name, found in times.items()}


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    figures: dict[str, dict[str, list[float]]] = {}
    print(f"{'':28}" + "".join(f"{name + ' fwd, bwd':>20}" for name in ("formula", "eager", "fused")))
    cases = [("activations", shape, activation, 1) for shape in ACTIVATIONS]
    cases += [("weights", shape, weight, shape[0]) for shape in WEIGHTS]
    for kind, shape, own, steps in cases:
        name = f"{kind} {'x'.join(map(str, shape))}"
        figures[name] = measure(shape, own, steps, given)
        print(f"{name:28}" + "".join(f"{first:12.2f}{second:8.2f}" for first, second in figures[name].values()))
    if given.output:
        given.output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
