"""What does a switchable training step cost beside those of other tools, on several networks, eager and compiled?

    python -m benchmarks.benchmark_networks --network cifar_resnet20 --batch 128 --fused --qadtr
    python -m benchmarks.benchmark_networks --network deit_small_patch16_224 --batch 16 --rounds 3 --precisions 32,4
    python -m benchmarks.benchmark_networks --network cifar_resnet20 --batch 128 --compile --precisions 4

Each round runs one step of each kind, and a figure is the median over the rounds of its time over that of the float
step in the same round; means of compiled steps are over the compiled float step. `--qadtr` adds steps of QADT-R, as the
loop makes them: patches in three gradient steps on half of the batch, and GIR. Beside them: Brevitas's own layers at 4
bit, and the QAT of torchao where it is installed, which quantizes linear layers only (int8 activations per token, int4
weights). With one thread times are processor seconds; with more they are wall seconds, which other work on the machine
makes longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.benchmark import Normalized, Step, at, patch_step, training_step
from qadtr_brevitas.config import load_recipe
from qadtr_brevitas.core.device import keep_freed_memory
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.quant import SwitchableModel, calibrate, convert, frozen_weights
from qadtr_brevitas.quant.compiled import compile_passes
from qadtr_brevitas.quant.folding import Foldable
from qadtr_brevitas.quant.fused import fused_on_cpu
from qadtr_brevitas.training.compiled import compile_training
from qadtr_brevitas.training.inputs import TrainingInputs

MEANS: dict[tuple[str, str], dict[str, float] | None] = {
    ("switchable", ""): {"training": 1.2, "crafting": 1.1},
    ("switchable", "fused"): {"training": 1.2, "crafting": 1.1},
    ("QADT-R", ""): {"training": 2.2},
    ("QADT-R", "fused"): {"training": 2.2},
    ("unfolded QADT-R", ""): None,
    ("compiled switchable", ""): {"training": 1.1, "crafting": 1.1},
    ("compiled QADT-R", ""): {"training": 2.2},
}
"""Kinds of steps, by how their names begin and end, with the bar of their mean; compiled ones beside compiled float."""
Times = dict[str, list[float]]


def stock(net: nn.Module) -> nn.Module:
    """The network with Brevitas's own layers at 4 bit."""
    weights: dict[str, Any] = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": 4}
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Conv2d):
            names = ("stride", "padding", "dilation", "groups")
            geometry = {key: getattr(module, key) for key in names}
            shape = (module.in_channels, module.out_channels, module.kernel_size)
            net.set_submodule(name, qnn.QuantConv2d(*shape, bias=module.bias is not None, **geometry, **weights))
        elif isinstance(module, nn.Linear):
            shape = (module.in_features, module.out_features)
            inputs = {"input_quant": Int8ActPerTensorFloat, "input_bit_width": 4}
            net.set_submodule(name, qnn.QuantLinear(*shape, bias=module.bias is not None, **weights, **inputs))
        elif isinstance(module, nn.ReLU):
            net.set_submodule(name, qnn.QuantReLU(bit_width=4))
    return net


def torchao(net: nn.Module) -> nn.Module:
    """The network as torchao prepares it for QAT."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantize_(net, QATConfig(activation_config=activations, weight_config=weights, step="prepare"))
    return net


def fused(step: Step) -> None:
    """The step with quantizers as fused kernels, as with `train.compile=quantizers`."""
    with fused_on_cpu():
        step()


def eager_and_fused(name: str, run: Callable[[int], None], given: argparse.Namespace) -> dict[str, Step]:
    """Steps by name at each precision, with eager quantizers and, if asked for, with fused ones."""
    steps: dict[str, Step] = {f"{name} {bits}": partial(run, bits) for bits in given.precisions}
    if given.fused:
        steps |= {f"{name} {bits}, fused": partial(fused, partial(run, bits)) for bits in given.precisions}
    return steps


def trainer(model: nn.Module, run: Any, images: torch.Tensor, labels: torch.Tensor) -> Step:
    """A training step through `run`, which may be the model or its compiled form."""
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
    model.train().to(memory_format=torch.channels_last)
    return partial(training_step, run, optimizer, images, labels)


def qadtr_trainer(
    model: SwitchableModel, run: Any, images: torch.Tensor, labels: torch.Tensor, *, folds: bool = True
) -> Step:
    """A training step of the shipped defense QADT-R through `run`, norms folded for patches or not."""
    recipe = load_recipe("digits_qadtr", [f"train.batch_size={len(images)}"])
    foldable = [] if folds else [Foldable({}, in_place=False)]
    inputs, rule = TrainingInputs(recipe, rank=0, processes=1, foldable=foldable), recipe.train.gradient
    assert rule is not None
    optimizer = rule.wrap(torch.optim.SGD(model.parameters(), 0.001, momentum=0.9), seed=0)
    number = 0

    def step() -> None:
        nonlocal number
        precision = model.switch.precision
        model.train()
        batch = inputs.attack(model, images, labels, step=number, precision=precision)
        optimizer.zero_grad()
        cross_entropy(run(batch.images), labels).backward()
        optimizer.set_context(step=number, precision=precision)
        optimizer.step()
        number += 1

    return step


def through(model: SwitchableModel, passes: Any, step: Callable[[], None]) -> Step:
    """A step whose attacks run through a compiled form of the model, or through none."""

    def run() -> None:
        model.switch.passes = passes
        step()

    return run


def steps_of(
    given: argparse.Namespace, images: torch.Tensor, labels: torch.Tensor
) -> tuple[dict[str, Step], SwitchableModel]:
    """The training steps by name, and the switchable model."""

    def net() -> nn.Module:
        return create_float_model(given.network, num_classes=given.classes)

    models = {"float": Normalized(net())}
    steps = {"float": trainer(models["float"], models["float"], images, labels)}
    switchable = convert(net(), sorted(given.precisions, reverse=True))
    calibrate(switchable, [images[:8]])
    step = trainer(switchable, switchable, images, labels)
    steps |= eager_and_fused("switchable", partial(at, switchable, step=step), given)
    if given.qadtr:
        step = through(switchable, None, qadtr_trainer(switchable, switchable, images, labels))
        steps |= eager_and_fused("QADT-R", partial(at, switchable, step=step), given)
        step = through(switchable, None, qadtr_trainer(switchable, switchable, images, labels, folds=False))
        steps |= {f"unfolded QADT-R {bits}": partial(at, switchable, bits, step) for bits in given.precisions}
    if given.compile:
        compile_passes(switchable, report=print)
        steps["compiled float"] = trainer(models["float"], torch.compile(models["float"]), images, labels)
        run = compile_training(switchable, precisions=len(given.precisions))
        step = trainer(switchable, run, images, labels)
        steps |= {f"compiled switchable {bits}": partial(at, switchable, bits, step) for bits in given.precisions}
        if given.qadtr:
            step = through(switchable, switchable.switch.passes, qadtr_trainer(switchable, run, images, labels))
            steps |= {f"compiled QADT-R {bits}": partial(at, switchable, bits, step) for bits in given.precisions}
    if not given.alone:
        others = Normalized(stock(net()))
        steps["stock Brevitas 4"] = trainer(others, others, images, labels)
        if find_spec("torchao"):
            others = Normalized(torchao(net()))
            steps["torchao, linear layers"] = trainer(others, others, images, labels)
    return steps, switchable


def times_of(steps: dict[str, Step], rounds: int, threads: int) -> Times:
    """Seconds of each step in each round."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: Times = {name: [] for name in steps}
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        if "compiled" in name:
            print(f"  first step of {name}: {time.perf_counter() - start:.0f} s", flush=True)
        # Brevitas collects statistics first.
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step()
            times[name].append(clock() - start)
    return times


def ratio(times: Times, name: str, base: str = "float") -> float:
    """The median over the rounds of the time of one step over that of another in the same round."""
    return statistics.median(own / other for own, other in zip(times[name], times[base], strict=True))


def crafting(
    model: SwitchableModel, passes: Any, given: argparse.Namespace, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, Step]:
    """Patch steps by name, the float network first; weights are frozen by the caller."""
    plain = Normalized(create_float_model(given.network, num_classes=given.classes)).eval().requires_grad_(False)
    steps: dict[str, Step] = {"float": partial(patch_step, plain, images, labels)}
    step = partial(patch_step, model, images, labels)
    steps |= eager_and_fused("switchable", partial(at, model, step=through(model, None, step)), given)
    if given.compile:
        run = torch.compile(plain)
        steps["compiled float"] = partial(patch_step, run, images, labels)
        step = through(model, passes, step)
        steps |= {f"compiled switchable {bits}": partial(at, model, bits, step) for bits in given.precisions}
    return steps


def show(kind: str, times: Times) -> None:
    """Print the medians of each step, and the means over the precisions beside their bars."""
    for name in times:
        print(f"  {name:26} {statistics.median(times[name]):7.3f} s {ratio(times, name):6.2f}x")
    for (start, end), bars in MEANS.items():
        base = "compiled float" if start.startswith("compiled") else "float"
        named = [name for name in times if name.startswith(start) and name.endswith("fused") == (end == "fused")]
        if named:
            mean = statistics.mean(ratio(times, name, base) for name in named)
            bar = f"  bar: {bars[kind]:.2f}" if bars else ""
            print(
                f"  mean of {start} {end:10} {'':9} {mean:6.2f}x {'of ' + base if base != 'float' else ''}{bar}",
                flush=True,
            )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cifar_resnet20")
    parser.add_argument("--classes", type=int, default=None, help="default: 10 for cifar_ networks, else 1000")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--precisions", type=lambda text: [int(bits) for bits in text.split(",")], default=[32, 8, 5, 4, 2]
    )
    parser.add_argument("--compile", action="store_true", help="whole passes through torch.compile too")
    parser.add_argument("--fused", action="store_true", help="compiled quantizers too, as train.compile=quantizers")
    parser.add_argument("--qadtr", action="store_true", help="steps of QADT-R too")
    parser.add_argument("--alone", action="store_true", help="without stock Brevitas and torchao")
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    given.classes = given.classes or (10 if given.network.startswith("cifar") else 1000)
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    side = create_float_model(given.network, num_classes=given.classes).pretrained_cfg["input_size"][-1]
    images = torch.rand(given.batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(given.classes, (given.batch,))
    steps, model = steps_of(given, images, labels)
    figures: dict[str, Any] = {"network": given.network, "batch": given.batch, "threads": given.threads}
    passes = model.switch.passes
    figures["training"] = times_of(steps, given.rounds, given.threads)
    model.eval()
    with frozen_weights(model):
        figures["crafting"] = times_of(crafting(model, passes, given, images, labels), given.rounds, given.threads)
    for kind in ("training", "crafting"):
        print(f"{kind} step of {given.network}, batch {given.batch}, {given.threads} thread(s)")
        show(kind, figures[kind])
    if not given.alone and not find_spec("torchao"):
        print("torchao is not installed, so it is not compared with: pip install torchao")
    if given.output:
        given.output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
