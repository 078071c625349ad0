"""How well do two processes share a training? Images per second of two against one, each with one thread.

    python -m benchmarks.benchmark_ddp

Weak scaling: each process trains the ResNet-20 of `cifar10_resnet20_qat` on batches of the same size, alone and beside
the other, in turns. 1.0 is perfect; the bar is 0.9. It needs two idle cores: a process that waits for the other, whose
core is busy with other work, counts as badly scaled. So the share of processor time within wall time is told too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.training.log import StepRecord, TrainingObserver
from qadtr_brevitas.training.loop import train

SKIPPED = 2


def recipe_of(batch: int, steps: int) -> Recipe:
    """A training on procedural images of the size of CIFAR-10."""
    data = {"name": "shapes", "image_size": 32, "classes": 3, "train_images": batch * steps, "test_images": 30}
    return Recipe.model_validate(
        {
            "model": {"name": "cifar_resnet20"},
            "data": {"dataset": data, "augment": "crop-flip"},
            "quant": {"precisions": [32, 4], "calibration": {"method": "minmax", "samples": 32}},
            "train": {"epochs": 1, "batch_size": batch, "precision": {"schedule": "fixed", "choice": 4}},
        }
    )


class Clock(TrainingObserver):
    """Notes wall and processor time after each step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_step(self, record: StepRecord) -> None:
        self.times.append((time.perf_counter(), time.process_time()))


def measure(batch: int, steps: int, output: Path) -> None:
    """Train in this process, one of those that torchrun started, and write seconds of each step of the first one."""
    torch.set_num_threads(1)
    processes, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    clock = Clock()
    with TemporaryDirectory() as folder:
        run = Path(os.environ.get("BENCHMARK_RUN", folder))
        train(recipe_of(batch * processes, steps), run, device="cpu", observer=clock)
    if rank == 0:
        differences = [
            (after[0] - before[0], after[1] - before[1])
            for before, after in zip(clock.times[SKIPPED:], clock.times[SKIPPED + 1 :], strict=False)
        ]
        output.write_text(json.dumps(differences))


def seconds(processes: int, batch: int, steps: int) -> tuple[float, float]:
    """Median wall and processor seconds of a step of so many processes."""
    with TemporaryDirectory() as folder:
        output = Path(folder) / "times.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "BENCHMARK_RUN": str(Path(folder) / "run")}
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        own = ["-m", "benchmarks.benchmark_ddp", "--measure", str(output), "--batch", str(batch), "--steps", str(steps)]
        subprocess.run(
            [sys.executable, *launcher, *own],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        found = json.loads(output.read_text())
    return statistics.median(wall for wall, _ in found), statistics.median(cpu for _, cpu in found)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="images of each process")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--measure", type=Path, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.batch, given.steps, given.measure)
        return
    rounds = []
    for _ in range(given.rounds):
        one, two = seconds(1, given.batch, given.steps), seconds(2, given.batch, given.steps)
        rounds.append({"one": one, "two": two, "scaling": one[0] / two[0], "of processor time": one[1] / two[1]})
        print(
            f"one process: {one[0]:.2f} s a step (processor {one[1]:.2f}), two: {two[0]:.2f} s ({two[1]:.2f}), "
            f"scaling {one[0] / two[0]:.2f}, of processor time {one[1] / two[1]:.2f}",
            flush=True,
        )
    for name in ("scaling", "of processor time"):
        print(f"weak scaling, {name}: {statistics.median(r[name] for r in rounds):.2f}, bar 0.9")
    if given.output:
        given.output.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
