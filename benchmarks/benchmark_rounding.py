"""How good are the levels of weights that each PTQ method chooses, and what does that take?

    QADTR_BREVITAS_DATA=DATA python -m benchmarks.benchmark_rounding
    QADTR_BREVITAS_DATA=DATA python -m benchmarks.benchmark_rounding --methods gptq --methods gptq+bias-correction
    QADTR_BREVITAS_DATA=DATA python -m benchmarks.benchmark_rounding --network tf_efficientnet_lite0 --test-images 250 \
      --methods percentile:gptq/parallel=8/target=quantized+bias-correction
    QADTR_BREVITAS_DATA=DATA python -m benchmarks.benchmark_rounding --network vit_tiny_patch16_224 --checkpoint RUN \
      --args '{patch_size: 4, embed_dim: 128, depth: 6, num_heads: 4}' --methods softmax_quantizer=log2@percentile:gptq

Calibrates a network (weights of the folder DATA or of --checkpoint, else random ones, for the seconds alone) with each
list of methods, on CIFAR-10 or the sample of ImageNet, of which every fourth picture is a test image. It prints its
accuracy at each precision, and the processor seconds of the calibration. A list is
[SETTING=VALUE,...@][RANGE:]METHOD[/OPTION=VALUE...]+METHOD..., where SETTING is one of `convert`, and RANGE `mse` (the
default), `minmax`, `percentile` or a number, the percentile. Three names stand for other tools on the same images:
`brevitas`, stock layers with Brevitas's calibration, GPTQ and bias correction; `onnxruntime`, quantize_static at 8 bit;
and `torchao`, where it is installed: linear layers only, with int8 activations per token. With --output, lists that the
file has already are not run again.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from brevitas.nn import QuantConv2d, QuantLinear
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
from ruamel.yaml import YAML
from torch import Tensor, nn

from benchmarks.benchmark_export import CHECKPOINTS, quantize_static, session
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.data.image_folder import Cifar10, ImageFolder
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.metrics import accuracy
from qadtr_brevitas.evaluation.predict import predict
from qadtr_brevitas.models.create import create_float_model, fixed_size_args, own_image_size
from qadtr_brevitas.models.weights import load_into, load_weights
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze, frozen_weights
from qadtr_brevitas.quant.layers import brevitas_twin

with warnings.catch_warnings():
    # It names an optional package that is not needed here.
    warnings.simplefilter("ignore")
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas.graph.gptq import gptq_mode

LISTS = (
    *("", "bias-correction", "gptq", "gptq+bias-correction", "coordinate-descent"),
    *(
        "gptq+coordinate-descent+bias-correction",
        "equalize+gptq",
        "adaround",
        "brecq",
        "brecq/range_learning_rate=0",
    ),
    "brevitas",
)
_PIXELS = 1 << 16


@dataclass(frozen=True)
class Case:
    """A float network from images in [0, 1] to logits, images to calibrate it on, and test images."""

    net: nn.Module
    batches: list[Tensor]
    test: Split

    def converted(self, precisions: Sequence[str], **settings: Any) -> SwitchableModel:
        """Return a switchable model, not calibrated."""
        return convert(self.net, ["32", *precisions], image_size=self.test.image_size, **settings).eval()

    def accuracy(self, model: nn.Module) -> float:
        """Return the percent of the test images that are right."""
        return 100 * (accuracy(predict(model, self.test), self.test.labels).value or 0.0)


def make_case(
    name: str, root: Path, train_images: int, test_images: int, checkpoint: Path | None = None, args: Any = None
) -> Case:
    """Return a network, of published weights or those of a file or run directory, with its images."""
    is_cifar = name.startswith("cifar_") or checkpoint is not None
    size = fixed_size_args(name, (32, 32)) if is_cifar else {}
    net = create_float_model(name, num_classes=10 if is_cifar else 1000, args={**(args or {}), **size}).eval()
    path = root / CHECKPOINTS[name] if checkpoint is None and name in CHECKPOINTS else checkpoint
    if path is not None:
        load_into(net, load_weights(path), source=str(path), name=name)
    if is_cifar:
        data: Cifar10 | ImageFolder = Cifar10(root=str(root))
    else:
        sample = root / "imagenet1k-sample.tar"
        data = ImageFolder(root=str(sample), holdout=4).fitted(*own_image_size(name, {}))
    train, test = data.load("train", limit=train_images), data.load("test", limit=test_images)
    at_once = max(1, _PIXELS // (train.image_size[0] * train.image_size[1]))
    batches = [train.batch(index)[0] for index in torch.arange(len(train)).split(at_once)]
    return Case(net, batches, test)


def parsed(given: str) -> tuple[dict[str, Any], Any, list[dict[str, Any]]]:
    """Return the settings of `convert`, and the range method and PTQ methods of a list, as `calibrate` takes them."""
    before, _, methods = given.rpartition("@")
    settings = {key: _named(value) for key, _, value in (part.partition("=") for part in before.split(",") if part)}
    settings = {key: value["name"] if len(value) == 1 else value for key, value in settings.items()}
    head, _, rest = methods.rpartition(":")
    ranges = {"name": "percentile", "percentile": float(head)} if head[:1].isdigit() else head or "mse"
    return settings, ranges, [_named(part) for part in rest.split("+") if part]


def _named(given: str) -> dict[str, Any]:
    """Return NAME/OPTION=VALUE... as a name and its options."""
    name, *options = given.split("/")
    yaml = YAML(typ="safe")
    return {"name": name, **{key: yaml.load(value) for key, _, value in (o.partition("=") for o in options)}}


def by_methods(case: Case, given: str, precisions: Sequence[str]) -> tuple[list[float], float]:
    """Calibrate a model, and return its accuracy at each precision, and the processor seconds it took."""
    settings, ranges, methods = parsed(given)
    model = case.converted(precisions, **settings)
    started = time.process_time()
    calibrate(model, case.batches, method=ranges, weights=methods)
    seconds = time.process_time() - started
    found: list[float] = []
    # 32 bit is the float network, whose accuracy is known.
    for precision in model.switch.allowed[1:]:
        with at_precision(model, precision), frozen_weights(model):
            found.append(case.accuracy(model))
    return found, seconds


def by_brevitas(case: Case, _: str, precisions: Sequence[str]) -> tuple[list[float], float]:
    """Do the same with stock Brevitas layers: inputs and weights of every layer, first and last at 8 bit or more."""
    plain = freeze(case.converted(precisions), 32)
    found, seconds = list[float](), 0.0
    for precision in map(Precision.parse, precisions):
        started = time.process_time()
        model = _stock(plain, case.batches, precision)
        seconds += time.process_time() - started
        found.append(case.accuracy(model))
    return found, seconds


def _stock(plain: nn.Module, batches: list[Tensor], precision: Precision) -> nn.Module:
    model = copy.deepcopy(plain)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    signed = _reads_negative([layer for _, layer in layers], model, batches[0])
    for name, layer in layers:
        is_end = name in (layers[0][0], layers[-1][0])
        model.set_submodule(name, _stock_layer(layer, precision, is_end=is_end, signed=layer in signed))
    with torch.no_grad():
        with calibration_mode(model):
            for images in batches:
                model(images)
        with gptq_mode(model, act_order=True) as gptq:
            for _ in range(gptq.num_layers):
                for images in batches:
                    gptq.model(images)
                gptq.update()
        with bias_correction_mode(model):
            for images in batches:
                model(images)
    return model.eval()


def _reads_negative(layers: list[nn.Module], model: nn.Module, images: Tensor) -> set[nn.Module]:
    found: set[nn.Module] = set()

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if float(args[0].min()) < 0:
            found.add(layer)

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def _stock_layer(layer: nn.Module, precision: Precision, *, is_end: bool, signed: bool) -> nn.Module:
    weight: Any = Int8WeightPerChannelFloat
    act: Any = Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat
    least = 8 if is_end else 2
    quantizers = {
        "weight_quant": weight.let(bit_width=max(least, precision.weight)),
        "input_quant": act.let(bit_width=max(least, precision.act)),
    }
    return brevitas_twin(layer, QuantConv2d, QuantLinear, **quantizers)


def by_onnxruntime(case: Case, _: str, precisions: Sequence[str]) -> tuple[list[float], float]:
    """Do the same at 8 bit with onnxruntime's own quantizer, from the float network; other precisions are not there."""
    plain = freeze(case.converted(precisions), 32)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, output = Path(folder, "float.onnx"), Path(folder, "quantized.onnx")
        # Image by image, because the file fixes the size of a batch.
        ones = [image for batch in case.batches for image in batch.split(1)]
        torch.onnx.export(plain, (ones[0],), str(source), input_names=["images"], dynamo=True, verbose=False)
        started = time.process_time()
        quantize_static(source, output, ones, "QUInt8")
        seconds = time.process_time() - started
        run = session(output)
        parts = [case.test.batch(index) for index in torch.arange(len(case.test)).split(1)]
        right = sum(int((run(images).argmax(1) == labels).sum()) for images, labels in parts)
    eight = 100 * right / len(case.test)
    values = [eight if Precision.parse(each) == Precision(8, 8) else float("nan") for each in precisions]
    return values, seconds


def by_torchao(case: Case, _: str, precisions: Sequence[str]) -> tuple[list[float], float]:
    """Do the same with torchao, whose activations have 8 bit; other precisions are not there."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, quantize_

    plain = freeze(case.converted(precisions), 32)
    found, seconds = list[float](), 0.0
    for precision in map(Precision.parse, precisions):
        if precision.act != 8:
            found.append(float("nan"))
            continue
        config = Int8DynamicActivationIntxWeightConfig(getattr(torch, f"int{precision.weight}"), PerAxis(0))
        model = copy.deepcopy(plain)
        started = time.process_time()
        quantize_(model, config)
        seconds += time.process_time() - started
        found.append(case.accuracy(model))
    return found, seconds


_TOOLS: dict[str, Callable[[Case, str, Sequence[str]], tuple[list[float], float]]] = {
    "brevitas": by_brevitas,
    "onnxruntime": by_onnxruntime,
    "torchao": by_torchao,
}


@click.command()
@click.option("--network", default="cifar_resnet20", show_default=True, help="A name of timm.")
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), help="Weights trained on CIFAR-10.")
@click.option("--args", default="{}", help="Arguments of the network, as YAML.")
@click.option("--methods", multiple=True, default=LISTS, help="PTQ methods in order, joined by +; several times.")
@click.option("--precisions", default="w4a8,4,3,2", show_default=True)
@click.option("--train-images", default=256, show_default=True)
@click.option("--test-images", default=1000, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file of what was measured.")
def main(
    network: str,
    checkpoint: Path | None,
    args: str,
    methods: tuple[str, ...],
    precisions: str,
    train_images: int,
    test_images: int,
    output: Path | None,
) -> None:
    """Print a line for each list of methods."""
    torch.set_num_threads(1)
    root = Path(os.environ["QADTR_BREVITAS_DATA"])
    case = make_case(network, root, train_images, test_images, checkpoint, YAML(typ="safe").load(args))
    wanted = precisions.split(",")
    measured: dict[str, Any] = json.loads(output.read_text()) if output is not None and output.exists() else {}
    if "float" not in measured:
        measured["float"] = case.accuracy(case.converted(["8"]))
    click.echo(f"float {measured['float']:.1f}")
    click.echo(f"{'':40}" + "".join(f"{name:>8}" for name in (*wanted, "seconds")))
    for each in methods:
        if each not in measured:
            found, seconds = _TOOLS.get(each, by_methods)(case, each, wanted)
            measured[each] = [*found, seconds]
            if output is not None:
                output.write_text(json.dumps(measured))
        click.echo(f"{each or 'nearest level':40}" + "".join(f"{value:8.1f}" for value in measured[each]))


if __name__ == "__main__":
    main()
