"""How fast and how small is the input pipeline? On an ImageNet-shaped set of JPEGs that is generated first.

    make bench                                # or: python -m benchmarks.benchmark_input --images 50000

As files in class folders and as the same files in webdataset's tars:

(a) peak memory of training on all images, and of validation on as many, against training on 500 of them (the process
    and its workers together);
(b) images per second at 224 pixels from two workers, against torchvision's ImageFolder and PyTorch's DataLoader with
    the same transforms on the files, interleaved in one run;
(c) what the training loop adds to reading a batch and a bare training step, in processor seconds of its process.

The pictures are few distinct ones, of mixed sizes, written again and again: reading them costs what others cost. Each
form of 50,000 takes 3 GB of disk. The network of (a) is a single convolution, so that its passes take no time beside
reading.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder as TorchvisionFolder

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.data.loader import BatchLoader, Request
from qadtr_brevitas.data.split import Split, epoch_order
from qadtr_brevitas.data.transform import TrainingTransform
from qadtr_brevitas.pipeline.build import build_split, build_switchable
from qadtr_brevitas.quant import set_precision
from qadtr_brevitas.training.log import EpochRecord, StepRecord, TrainingObserver
from qadtr_brevitas.training.loop import train

CLASSES, DISTINCT, SIZE, FEW = 1000, 40, 224, 500
BATCH, WORKERS = 64, 2
FORMS = ("folders", "shards")
# Samples of one tar, as published shards of ImageNet have.
PER_SHARD = 1250
TINY = "benchmarks.benchmark_input:tiny"


def tiny(num_classes: int = CLASSES) -> nn.Module:
    """A network of one convolution."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
    )


def generate(folder: Path, images: int) -> None:
    """Write images/CLASSES JPEGs of 300 to 640 pixels into each class folder, unless they are there."""
    if (folder / f"{images}.done").exists():
        return
    draw = numpy.random.default_rng(0)
    encoded: list[bytes] = []
    for _ in range(DISTINCT):
        height, width = draw.integers(300, 640, 2)
        coarse = Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=numpy.uint8))
        pixels = numpy.asarray(coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC)).astype(int)
        noisy = (pixels + draw.integers(-12, 13, pixels.shape)).clip(0, 255).astype(numpy.uint8)
        file = BytesIO()
        Image.fromarray(noisy).save(file, format="jpeg", quality=75)
        encoded.append(file.getvalue())
    for number in range(images):
        place = folder / "train" / f"n{number % CLASSES:08}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:07}.JPEG").write_bytes(encoded[number % DISTINCT])
    (folder / f"{images}.done").touch()


def pack(folder: Path, images: int) -> None:
    """Write the pictures into tars, mixed as shards are, unless that is done."""
    place = folder / "shards" / "train"
    if (folder / f"{images}.packed").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    for old in place.glob("*.tar"):
        old.unlink()
    files = sorted((folder / "train").glob("*/*.JPEG"))
    order = numpy.random.default_rng(0).permutation(len(files))
    count = -(-len(files) // PER_SHARD)
    for number in range(count):
        with tarfile.open(place / f"x-{number:05}-of-{count:05}.tar", "w") as tar:
            for index in order[number * PER_SHARD : (number + 1) * PER_SHARD]:
                tar.add(files[index], f"{files[index].stem}.jpg")
                label = str(int(files[index].parent.name[1:])).encode()
                member = tarfile.TarInfo(f"{files[index].stem}.cls")
                member.size = len(label)
                tar.addfile(member, BytesIO(label))
    (folder / f"{images}.packed").touch()


def source_of(folder: Path, form: str) -> dict[str, Any]:
    """The data set of one form; all of its pictures serve for training and for tests."""
    root = folder / ("both" if form == "folders" else "shards")
    for name, target in (("train", folder / "train"), ("val", root / "train")):
        if not (root / name).exists():
            root.mkdir(exist_ok=True)
            (root / name).symlink_to(target.absolute(), target_is_directory=True)
    kind = {"name": "image-folder"} if form == "folders" else {"name": "shards", "classes": CLASSES}
    return {**kind, "root": str(root), "image_size": SIZE}


def recipe_of(
    source: dict[str, Any], *, limit: int | None, batch: int, network: str, test_limit: int | None = 16
) -> Recipe:
    limits = {"train_limit": limit, "test_limit": test_limit}
    return Recipe.model_validate(
        {
            "model": {"name": network, "num_classes": CLASSES},
            "data": {"dataset": source, "transform": {}, "workers": WORKERS, **limits},
            "quant": {"precisions": [8], "calibration": {"method": "minmax", "samples": 16}},
            "train": {"epochs": 9, "batch_size": batch, "precision": {"schedule": "fixed", "choice": 8}},
        }
    )


class Enough(Exception):
    """So many steps are done."""


class Clock(TrainingObserver):
    """Notes the processor time of each step, and ends the run after so many; None: when an epoch was validated."""

    def __init__(self, steps: int | None) -> None:
        self.steps, self.times = steps, []

    def on_step(self, record: StepRecord) -> None:
        self.times.append(time.process_time())
        if len(self.times) == self.steps:
            raise Enough

    def on_epoch(self, record: EpochRecord) -> None:
        if self.steps is None:
            raise Enough


def train_some(recipe: Recipe, steps: int | None) -> list[float]:
    """Return the processor seconds of each step but the first."""
    clock = Clock(steps)
    with tempfile.TemporaryDirectory() as run, contextlib.suppress(Enough):
        train(recipe, run, device="cpu", observer=clock)
    return [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]


def tree(root: int) -> list[int]:
    """The process and those below it."""
    parents: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        parents.setdefault(parent, []).append(int(place.name))
    found = [root]
    for process in found:
        found += parents.get(process, [])
    return found


def memory(root: int) -> int:
    """Bytes of a process and those below it; what they share counts once."""
    total = 0
    for process in tree(root):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return 1024 * total


def peak_memory(folder: Path, form: str, limit: int | None, steps: int, *, validate: bool = False) -> float:
    """Peak GB of a training run in a process of its own, which can end with a validation on all pictures."""
    this = [sys.executable, "-m", "benchmarks.benchmark_input"]
    command = [*this, "--folder", str(folder), "--forms", form, "--train-only", str(steps)]
    limits = [] if limit is None else ["--limit", str(limit)]
    process = subprocess.Popen([*command, *limits, *(["--validate"] if validate else [])])
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"training on {limit or 'all'} images failed")
    return peak / 1e9


def train_split(recipe: Recipe) -> Split:
    return build_split(recipe.data, "train", seed=0)


def throughput(folder: Path, form: str, rounds: int, batches: int) -> tuple[list[float], list[float]]:
    """Images per second of this package and of torchvision, round by round."""
    split = train_split(recipe_of(source_of(folder, form), limit=None, batch=BATCH, network=TINY))
    theirs = transforms.Compose(
        [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    dataset = TorchvisionFolder(str(folder / "train"), theirs)
    transform = TrainingTransform(size=(SIZE, SIZE), scale=(0.08, 1.0), interpolation="bilinear")
    order = epoch_order(len(split), seed=0, epoch=0)

    def request(step: int) -> Request:
        return Request(0, order[BATCH * step : BATCH * (step + 1)])

    own_rates, other_rates = [], []
    for number in range(rounds):
        first = number * (batches + 8)
        loader = BatchLoader(split, transform, request, seed=0, workers=WORKERS)
        loader.pixels(first)
        start = time.perf_counter()
        for step in range(first + 1, first + batches + 1):
            loader.pixels(step).float().div_(255)
        own_rates.append(BATCH * batches / (time.perf_counter() - start))
        loader.close()
        reader = iter(DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS))
        next(reader)
        start = time.perf_counter()
        for _ in range(batches):
            next(reader)
        other_rates.append(BATCH * batches / (time.perf_counter() - start))
        del reader
    return own_rates, other_rates


def loop_cost(source: dict[str, Any], *, batch: int, steps: int) -> tuple[float, float]:
    """Processor seconds of a step in the loop, and of reading its batch and a bare step beside each other."""
    recipe = recipe_of(source, limit=FEW, batch=batch, network="resnet18")
    looped = train_some(recipe, steps + 1)
    split = train_split(recipe)
    model, _ = build_switchable(recipe, split)
    model.train().to(memory_format=torch.channels_last)
    set_precision(model, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    transform = TrainingTransform(size=(SIZE, SIZE), scale=(0.08, 1.0))
    order = epoch_order(len(split), seed=0, epoch=0)
    loader = BatchLoader(
        split, transform, lambda step: Request(0, order[batch * step : batch * step + batch]), seed=0, workers=WORKERS
    )
    bare: list[float] = []
    for step in range(steps + 1):
        before = time.process_time()
        images = loader.pixels(step).float().div_(255)
        labels = split.labels[order[batch * step : batch * step + batch]]
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        bare.append(time.process_time() - before)
    loader.close()
    return statistics.median(looped), statistics.median(bare[1:])


def measure(given: argparse.Namespace, form: str) -> dict[str, Any]:
    """Print and return the figures of one form."""
    few, whole = (peak_memory(given.folder, form, limit, given.steps) for limit in (FEW, None))
    validated = peak_memory(given.folder, form, BATCH * given.steps, given.steps, validate=True)
    print(
        f"{form}: peak memory {whole:.2f} GB on {given.images:,} images, {validated:.2f} GB validated on as many, "
        f"{few:.2f} GB on {FEW}, bar: 1.5 GB more"
    )
    own, other = throughput(given.folder, form, given.rounds, given.batches)
    ratio = statistics.median(mine / theirs for mine, theirs in zip(own, other, strict=True))
    rates = f"{statistics.median(own):.0f} and {statistics.median(other):.0f} images/s"
    print(f"{form}: loader {rates} (torchvision on files), ratio {ratio:.2f}, bar: 1.0")
    looped, bare = loop_cost(source_of(given.folder, form), batch=16, steps=6)
    print(f"{form}: loop {looped:.2f} s a step, reading and a bare step {bare:.2f} s, {looped / bare:.3f}, bar: 1.03")
    memory_gb = {"all": whole, "validated": validated, "few": few}
    return {"memory_gb": memory_gb, "rates": [own, other], "ratio": ratio, "loop": [looped, bare]}


def train_only(given: argparse.Namespace) -> None:
    """Train as a measurement of memory does, in the process that is measured."""
    source, test_limit = source_of(given.folder, given.forms[0]), None if given.validate else 16
    recipe = recipe_of(source, limit=given.limit, batch=BATCH, network=TINY, test_limit=test_limit)
    train_some(recipe, None if given.validate else given.train_only)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="at least 2,000")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "imagenet_shaped")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="as files, or as tars of them")
    parser.add_argument("--steps", type=int, default=12, help="training steps of each memory measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=12, help="of 64 images, in each round of (b)")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--train-only", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--validate", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.train_only:
        train_only(given)
        return
    os.makedirs(given.folder, exist_ok=True)
    generate(given.folder, given.images)
    if "shards" in given.forms:
        pack(given.folder, given.images)
    figures = {form: measure(given, form) for form in given.forms}
    if given.output:
        given.output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
