"""What does each option of training cost? Processor seconds of a step with it, over those of the plain step.

    QADTR_BREVITAS_DATA=DATA python -m benchmarks.benchmark_training_options

Trains the CIFAR-10 ResNet-20 of `cifar10_resnet20_qat` on one thread for a few steps with each option, all in one
process. The plain step is measured at the start and at the end, which tells the noise.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from qadtr_brevitas.config import load_recipe
from qadtr_brevitas.training.log import TrainingObserver
from qadtr_brevitas.training.loop import train

SANDWICH = "train.precision={schedule: sandwich}"
CHAIN = "train.regularizers=[{name: distillation, teacher: chain}]"
# By name: the defense, and further keys.
OPTIONS: dict[str, tuple[str, list[str]]] = {
    "plain": ("uniform", []),
    "alrs": ("uniform", ["train.optimizer.threshold_rule=alrs"]),
    "weight-distribution": ("uniform", ["train.regularizers=[weight-distribution]"]),
    "sandwich": ("uniform", [SANDWICH]),
    "sandwich, update each": ("uniform", [SANDWICH, "train.update=each"]),
    "sandwich, update each, chain": ("uniform", [SANDWICH, "train.update=each", CHAIN]),
    "qadtr": ("qadtr", []),
    "qadtr_universal": ("qadtr_universal", []),
    "qadtr_mat": ("qadtr_mat", []),
    "qadtr_mat, share 0.5": ("qadtr_mat", ["train.attack.share=0.5"]),
    "triqdef": ("triqdef", []),
    "triqdef, no attack": ("triqdef", ["train.attack=null"]),
    "triqdef, no attack, gradient 0": ("triqdef", ["train.attack=null", "train.objective.gradient=0"]),
    "plain again": ("uniform", []),
}


class Clock(TrainingObserver):
    """Notes the processor time of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step(self, record: Any) -> None:
        self.times.append(time.process_time())


def seconds_per_step(defense: str, keys: list[str], *, steps: int, batch_size: int) -> float:
    """Return the mean processor seconds of a step; the first one, which sets up, does not count."""
    short = [
        *("train.epochs=1", f"train.batch_size={batch_size}", "train.scheduler.warmup_epochs=0"),
        *(f"data.train_limit={batch_size * steps}", "data.test_limit=20"),
        "quant.calibration={method: minmax, samples: 32}",
    ]
    clock = Clock()
    with TemporaryDirectory() as folder:
        recipe = load_recipe(f"cifar10_resnet20_qat+{defense}", [*short, *keys])
        train(recipe, Path(folder) / "run", device="cpu", observer=clock)
    return statistics.mean(after - before for before, after in zip(clock.times[1:], clock.times[2:], strict=False))


@click.command()
@click.option("--steps", default=5, show_default=True, help="steps of each run, the first two of which do not count")
@click.option("--batch-size", default=64, show_default=True)
def main(steps: int, batch_size: int) -> None:
    """Print a line for each option."""
    torch.set_num_threads(1)
    plain = 0.0
    for name, (defense, keys) in OPTIONS.items():
        seconds = seconds_per_step(defense, keys, steps=steps, batch_size=batch_size)
        plain = plain or seconds
        click.echo(f"{name:32}{seconds:8.2f} s{seconds / plain:8.2f}")


if __name__ == "__main__":
    main()
