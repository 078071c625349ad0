"""How good are the levels of weights that each PTQ method chooses, and what does that take?

    QADTR_BREVITAS_DATA=DATA python -m benchmarks.benchmark_rounding
    QADTR_BREVITAS_DATA=DATA python -m benchmarks.benchmark_rounding --methods gptq --methods gptq+bias-correction

Calibrates the published CIFAR-10 ResNet-20 (`resnet20_cifar10.safetensors` in the folder DATA, with CIFAR-10) with each
list of methods, and prints its accuracy at each precision and the processor seconds of the calibration.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import click
import torch
from safetensors.torch import load_file

from qadtr_brevitas.data.image_folder import Cifar10
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.metrics import accuracy
from qadtr_brevitas.evaluation.predict import predict
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, frozen_weights

LISTS = (
    *("", "bias-correction", "gptq", "gptq+bias-correction", "coordinate-descent"),
    "gptq+coordinate-descent+bias-correction",
)
_BATCH = 64


def make_model(weights: Path, precisions: list[str]) -> SwitchableModel:
    """Return the published network, converted but not calibrated."""
    net = create_float_model("cifar_resnet20", num_classes=10).eval()
    net.load_state_dict(load_file(weights))
    return convert(net, ["32", *precisions], image_size=(32, 32)).eval()


def measure(model: SwitchableModel, train: Split, test: Split, methods: list[str]) -> tuple[list[float], float]:
    """Calibrate a model, and return its accuracy in percent at each precision, and the processor seconds it took."""
    started = time.process_time()
    calibrate(model, [train.batch(index)[0] for index in torch.arange(len(train)).split(_BATCH)], weights=methods)
    seconds = time.process_time() - started
    found: list[float] = []
    for precision in model.switch.allowed:
        with at_precision(model, precision), frozen_weights(model):
            found.append(100 * (accuracy(predict(model, test), test.labels).value or 0.0))
    return found, seconds


@click.command()
@click.option("--methods", multiple=True, default=LISTS, help="PTQ methods in order, joined by +; several times.")
@click.option("--precisions", default="w4a8,4,3,2", show_default=True)
@click.option("--train-images", default=256, show_default=True)
@click.option("--test-images", default=1000, show_default=True)
def main(methods: tuple[str, ...], precisions: str, train_images: int, test_images: int) -> None:
    """Print a line for each list of methods."""
    torch.set_num_threads(1)
    root = Path(os.environ["QADTR_BREVITAS_DATA"])
    data = Cifar10(root=str(root))
    train, test = data.load("train", limit=train_images), data.load("test", limit=test_images)
    wanted = precisions.split(",")
    click.echo(f"{'':40}" + "".join(f"{name:>8}" for name in ("32", *wanted, "seconds")))
    for each in methods:
        model = make_model(root / "resnet20_cifar10.safetensors", wanted)
        found, seconds = measure(model, train, test, [name for name in each.split("+") if name])
        click.echo(f"{each or 'nearest level':40}" + "".join(f"{value:8.1f}" for value in (*found, seconds)))


if __name__ == "__main__":
    main()
