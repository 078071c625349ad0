"""How fast is switchable quantization? Everything in one run on one machine, interleaved, as medians and ratios.

    make bench                                # or: python benchmarks/benchmark.py --rounds 15 --output bench.json

(a) training step of ResNet-20, batch 128: switchable, mean over 32, 8, 5, 4 and 2 bit, against float; stock
    Brevitas (QuantConv2d and QuantReLU, 4 bit) beside it; the same in bfloat16 (`train.amp=bf16`) against itself;
(b) patch-crafting step, batch 64 (forward, gradient to the input alone) under frozen_weights, against float;
(c) peak memory of (a) against float;
(d) time of `qadtr-brevitas --help`.

On a CPU times are processor seconds of one thread, so that other work on the machine counts as little as possible.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import brevitas
import brevitas.nn as qnn
import timm
import torch
from brevitas.quant import Int8WeightPerChannelFloat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from qadtr_brevitas.core.device import keep_freed_memory
from qadtr_brevitas.core.precision import DEFAULT_BITS
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.quant import SwitchableModel, calibrate, convert, frozen_weights, set_precision

Step = Callable[[], object]


def float_model() -> nn.Module:
    """ResNet-20 as the same program makes it, with quantization off: the fair baseline."""
    return Normalized(create_float_model("cifar_resnet20", num_classes=10))


def stock_model() -> nn.Module:
    """ResNet-20 with Brevitas's own layers at 4 bit, as its documentation writes them."""
    net = create_float_model("cifar_resnet20", num_classes=10)
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Conv2d):
            quant = Int8WeightPerChannelFloat
            settings = {"weight_quant": quant, "weight_bit_width": 4, "bias": module.bias is not None}
            shape = (module.in_channels, module.out_channels, module.kernel_size)
            layer = qnn.QuantConv2d(*shape, stride=module.stride, padding=module.padding, **settings)
            net.set_submodule(name, layer)
        elif isinstance(module, nn.ReLU):
            net.set_submodule(name, qnn.QuantReLU(bit_width=4))
    return Normalized(net)


def switchable_model(images: Tensor) -> SwitchableModel:
    """The converted and calibrated ResNet-20."""
    model = convert(create_float_model("cifar_resnet20", num_classes=10), DEFAULT_BITS)
    calibrate(model, [images.cpu()])
    return model


class Normalized(nn.Module):
    """A float network with its normalization inside, as the switchable model has it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(net.pretrained_cfg["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(net.pretrained_cfg["std"]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images - self.mean) / self.std)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """One plain training step."""
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def patch_step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Forward, and the gradient of the loss with respect to the images alone."""
    images = images.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(images), labels), images)[0]


def clock(device: torch.device) -> Callable[[], float]:
    """Processor seconds on a CPU, synchronized wall seconds elsewhere."""
    if device.type == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def interleaved(steps: dict[str, Step], rounds: int, now: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each step; every round runs each of them once, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = now()
            step()
            times[name].append(now() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most memory held by tensors at one time during a step, beyond what is held before it."""
    step()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    sizes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e.get("ts", 0)) if e.get("name") == "[memory]"]
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return peak


def at(model: nn.Module, bits: int, step: Step) -> None:
    """The step at a precision; switching is part of what is timed."""
    set_precision(model, bits)
    step()


def in_bf16(device: torch.device, step: Step) -> None:
    """The step under autocast, as `train.amp=bf16` runs it."""
    with torch.autocast(device.type, torch.bfloat16):
        step()


def help_seconds() -> float:
    """Wall seconds of the command line's --help, the best of five."""
    command = [sys.executable, "-m", "qadtr_brevitas", "--help"]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def measure(device: torch.device, rounds: int) -> dict[str, object]:
    """Runs (a) to (d) and returns milliseconds, bytes, seconds and ratios."""
    torch.manual_seed(0)
    images, labels = torch.rand(128, 3, 32, 32, device=device), torch.randint(10, (128,), device=device)
    models = {
        "float": float_model().to(device),
        "switchable": switchable_model(images).to(device),
        "stock Brevitas": stock_model().to(device),
    }
    sgd = {name: torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for name, m in models.items()}
    train = {name: partial(training_step, m.train(), sgd[name], images, labels) for name, m in models.items()}
    for _ in range(2):
        train["stock Brevitas"]()
    steps: dict[str, Step] = {"float": train["float"], "stock Brevitas 4": train["stock Brevitas"]}
    steps |= {f"switchable {b}": partial(at, models["switchable"], b, train["switchable"]) for b in DEFAULT_BITS}
    now = clock(device)
    rounded = {f"{name}, bf16": partial(in_bf16, device, step) for name, step in steps.items()}
    training = interleaved(steps | rounded, rounds, now)
    bf16 = {name: training.pop(f"{name}, bf16") / training[name] for name in steps}
    memory = {"float": peak_bytes(train["float"], device), "switchable": peak_bytes(steps["switchable 4"], device)}

    craft = {name: partial(patch_step, m.eval(), images[:64], labels[:64]) for name, m in models.items()}
    for name in ("float", "stock Brevitas"):
        models[name].requires_grad_(False)
    model = models["switchable"]
    steps = {"float": craft["float"], "stock Brevitas 4": craft["stock Brevitas"]}
    with frozen_weights(model):
        steps |= {f"switchable {b}": partial(at, model, b, craft["switchable"]) for b in DEFAULT_BITS}
        crafting = interleaved(steps, rounds, now)
    return {
        "training_ms": training,
        "training_ratio": _ratio(training),
        "bf16_ratio": bf16,
        "patch_ms": crafting,
        "patch_ratio": _ratio(crafting),
        "peak_bytes": memory,
        "peak_ratio": memory["switchable"] / memory["float"],
        "help_seconds": help_seconds(),
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "torch": torch.__version__,
            "brevitas": brevitas.__version__,
            "timm": timm.__version__,
        },
    }


def _ratio(times: dict[str, float]) -> dict[str, float]:
    ratios = {name: value / times["float"] for name, value in times.items()}
    ratios["switchable, mean"] = statistics.mean(v for k, v in ratios.items() if k.startswith("switchable"))
    return ratios


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--give-back", action="store_true", help="let glibc give back freed memory, as it would alone")
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    arguments = parser.parse_args()
    if arguments.device.type == "cpu":
        torch.set_num_threads(1)
    if not arguments.give_back:
        keep_freed_memory()
    result = measure(arguments.device, arguments.rounds)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for title, key in (("training step", "training"), ("patch-crafting step", "patch")):
        print(f"{title} against float")
        for name, ratio in result[f"{key}_ratio"].items():
            print(f"  {name:18} {ratio:6.2f}x")
    print("training step in bfloat16 against the same in float32")
    for name, ratio in result["bf16_ratio"].items():
        print(f"  {name:18} {ratio:6.2f}x")
    print(f"peak memory of a training step against float {result['peak_ratio']:.2f}x")
    print(f"qadtr-brevitas --help {result['help_seconds']:.2f} s")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
