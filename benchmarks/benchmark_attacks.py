"""Measure how fast the patch attacks and the scoring are, in one run on one machine, interleaved, as ratios.

    make bench                                # or: python benchmarks/benchmark_attacks.py --rounds 9

All on one float ResNet-20, batch 64, an 8x8 patch:

(a) a step of LAVAN and of GAP, made on the converted network at 32 bit as `attack` does (norms folded, in bfloat16
    where the CPU has units for it), against the ceiling, forward and gradient to the images alone in the float network,
    and against ART, the Adversarial Robustness Toolbox (`pip install --group peers`; left out if it is not installed).
    ART gets the network as it is loaded and, in a row of its own, with channels-last weights, which may be faster; so
    does the ceiling, which has a row in bfloat16 too. LAVAN has rows in float32 and without folding;
(b) time to the ASR that ART's patch reaches in `--art-steps` steps, same images, target, places and step size;
(c) one patch scored on `--images` images at 32, 8, 5, 4 and 2 bit, against five float passes over the clean images, of
    the network as it is loaded and with channels-last weights.

With QADTR_BREVITAS_DATA set (CIFAR-10 and published weights, see README) the network is trained; without, its weights
are random, which changes no time of (a) and (c), and (b) is left out. Times are processor seconds of one CPU thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from benchmark import clock, float_model, patch_step
from torch import nn

from qadtr_brevitas.attacks.gap import Gap
from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.device import has_fast_bf16, keep_freed_memory
from qadtr_brevitas.core.precision import DEFAULT_BITS
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.image_folder import Cifar10
from qadtr_brevitas.data.shapes import Shapes
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.metrics import score
from qadtr_brevitas.evaluation.predict import predict
from qadtr_brevitas.models.weights import load_into, load_weights
from qadtr_brevitas.quant import at_precision, calibrate, convert, folded_norms, frozen_weights

SIDE, BATCH, TARGET, LR = 8, 64, 5, 0.1
WEIGHTS = "resnet20_cifar10.safetensors"
Clock = Callable[[], float]


@dataclass(frozen=True)
class BenchmarkSetup:
    """Networks, images and budget of all measurements.

    Args:
        net: the float network with channels-last weights.
        loaded: the same network with weights as they were loaded.
        model: the same network, converted.
        train: images that patches are made on.
        test: images that patches are scored on.
        trained: whether the weights are trained.
        now: reads the clock.
        steps: steps in a round.
        rounds: rounds that are measured.
    """

    net: nn.Module
    loaded: nn.Module
    model: nn.Module
    train: Split
    test: Split
    trained: bool
    now: Clock
    steps: int
    rounds: int

    def asr(self, patch: Patch, *, images: int = 1000) -> float:
        """Return the targeted ASR on the first test images."""
        few = self.test.subset(torch.arange(min(images, len(self.test))))
        clean, patched = predict(self.net, few), predict(self.net, few, patch=patch)
        return score(clean, patched, few.labels, target=TARGET).asr.value or 0.0


def ceiling_times(setup: BenchmarkSetup, net: nn.Module, *, bf16: bool = False) -> list[float]:
    """Return the seconds of forward pass and gradient in the images, the least an attack has to compute."""
    times = []
    for number in range(setup.steps):
        images, labels = setup.train.batch(torch.arange(BATCH) + BATCH * number)
        start = setup.now()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            patch_step(net, images, labels)
        times.append(setup.now() - start)
    return times


def fit(
    setup: BenchmarkSetup,
    attack: Any,
    *,
    held_out: int,
    folded: bool = True,
    bf16: bool = True,
    progress: Callable[..., object] | None = None,
) -> Patch:
    """Return a patch as `qadtr-brevitas attack` makes it, at 32 bit."""
    bf16 = bf16 and has_fast_bf16("cpu")
    chosen_on = setup.test.images[-held_out:], setup.test.labels[-held_out:]
    few = setup.train.batch(torch.arange(2))[0]
    with frozen_weights(setup.model), folded_norms(setup.model, few, bf16=bf16) if folded else nullcontext():
        images, labels = setup.train.images, setup.train.labels
        return attack.fit(setup.model, images, labels, held_out=chosen_on, seed=0, progress=progress)


def attack_times(setup: BenchmarkSetup, attack: Any, **how: bool) -> list[float]:
    """Return the seconds between the progress reports of our attack: everything a step does."""
    stamps: list[float] = []
    fit(setup, attack, held_out=BATCH, progress=lambda *_, **__: stamps.append(setup.now()), **how)
    # The last step also scores the patch on held-out images.
    return [after - before for before, after in pairwise(stamps[:-1])]


def art_attack(net: nn.Module) -> Any:
    """Return ART's attack with a patch of the same size on the same network; None if ART is not installed."""
    try:
        from art.attacks.evasion import AdversarialPatchPyTorch
        from art.estimators.classification import PyTorchClassifier
    except ImportError:
        return None
    estimator = PyTorchClassifier(
        net, nn.CrossEntropyLoss(), input_shape=(3, 32, 32), nb_classes=10, clip_values=(0, 1), device_type="cpu"
    )
    # ART enlarges the patch to the size of the image and scales it down again.
    return AdversarialPatchPyTorch(
        estimator,
        rotation_max=22.5,
        scale_min=SIDE / 32,
        scale_max=SIDE / 32,
        learning_rate=LR,
        max_iter=1,
        batch_size=BATCH,
        patch_shape=(3, SIDE, SIDE),
        patch_type="square",
        verbose=False,
    )


def art_epoch(setup: BenchmarkSetup, art: Any, *, start: int, steps: int) -> float:
    """Run ART for some steps and return the seconds of one step."""
    images, labels = setup.train.batch(torch.arange(start, start + BATCH * steps) % len(setup.train))
    images = images[labels != TARGET]
    targets = torch.nn.functional.one_hot(torch.full((len(images),), TARGET), 10).numpy()
    before = setup.now()
    art.generate(images.numpy(), targets)
    return (setup.now() - before) / -(-len(images) // BATCH)


def step_times(setup: BenchmarkSetup) -> dict[str, float]:
    """Measure (a), the seconds of a step: the mean of the fastest round; every round runs each attack in turn.

    Other work on the machine, which a program in a virtual machine cannot see, only adds to times.
    """
    common = {"size": SIDE, "steps": setup.steps + 2, "check_every": setup.steps + 2, "batch_size": BATCH}
    lavan, gap = Lavan(target=TARGET, **common), Gap(target=TARGET, shape="square", **common)
    rows: dict[str, Callable[[], list[float]]] = {
        "ceiling": lambda: ceiling_times(setup, setup.net),
        "ceiling, as loaded": lambda: ceiling_times(setup, setup.loaded),
        "ceiling, bfloat16": lambda: ceiling_times(setup, setup.net, bf16=True),
        "LAVAN": lambda: attack_times(setup, lavan),
        "GAP": lambda: attack_times(setup, gap),
        "LAVAN, float32": lambda: attack_times(setup, lavan, bf16=False),
        "LAVAN, not folded": lambda: attack_times(setup, lavan, folded=False),
    }
    if (art := art_attack(setup.loaded)) and (faster_art := art_attack(setup.net)):
        rows["ART"] = lambda: [art_epoch(setup, art, start=0, steps=setup.steps)]
        rows["ART, channels last"] = lambda: [art_epoch(setup, faster_art, start=0, steps=setup.steps)]
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(setup.rounds + 1):
        for name, measure in rows.items():
            mean = statistics.mean(measure())
            # The first round warms up.
            times[name] += [mean] if number else []
    return {name: min(means) for name, means in times.items()}


def art_race(setup: BenchmarkSetup, art_steps: int) -> dict[str, float] | None:
    """Measure (b): ART's ASR and seconds, and the seconds of our shortest search that reaches that ASR."""
    art = art_attack(setup.net)
    if art is None or not setup.trained:
        return None
    chunk = 50
    art_seconds = sum(
        chunk * art_epoch(setup, art, start=number * chunk * BATCH, steps=chunk) for number in range(art_steps // chunk)
    )
    texture = (art._patch.detach().float().clamp(0, 1) * 255).round() / 255
    goal = setup.asr(Patch(texture=texture, mask=torch.ones(SIDE, SIDE, dtype=torch.bool)))
    for steps in (10, 20, 30, 40, 60, 80, 120, 160, 240, 320):
        attack = Lavan(size=SIDE, target=TARGET, lr=LR, steps=steps, check_every=steps, batch_size=BATCH)
        before = setup.now()
        patch = fit(setup, attack, held_out=200)
        seconds, asr = setup.now() - before, setup.asr(patch)
        if asr >= goal:
            return {"art_asr": goal, "art_s": art_seconds, "asr": asr, "s": seconds, "steps": steps}
    return {"art_asr": goal, "art_s": art_seconds, "asr": asr, "s": float("nan"), "steps": steps}


def scoring_ratios(setup: BenchmarkSetup, images: int, rounds: int) -> dict[str, float]:
    """Measure (c): one patch at all precisions, against as many float passes over the clean images."""
    model = convert(float_model().net, DEFAULT_BITS)
    calibrate(model, [setup.test.batch(torch.arange(128))[0]])
    model.eval().to(memory_format=torch.channels_last)
    few = setup.test.subset(torch.arange(min(images, len(setup.test))))
    patch = Patch(texture=torch.full((3, SIDE, SIDE), 128 / 255), mask=torch.ones(SIDE, SIDE, dtype=torch.bool))
    seconds: dict[str, list[float]] = {"ours": [], "as loaded": [], "channels last": []}
    for _ in range(rounds):
        # Switchable and float passes alternate, so that drift affects all alike.
        for column in seconds.values():
            column.append(0.0)
        with frozen_weights(model):
            for bits in DEFAULT_BITS:
                with at_precision(model, bits):
                    seconds["ours"][-1] += _timed(setup.now, lambda: predict(model, few, patch=patch))
                seconds["as loaded"][-1] += _timed(setup.now, lambda: predict(setup.loaded, few))
                seconds["channels last"][-1] += _timed(setup.now, lambda: predict(setup.net, few))
    ours = min(seconds.pop("ours"))
    return {name: ours / min(column) for name, column in seconds.items()}


def _timed(now: Clock, work: Callable[[], object]) -> float:
    start = now()
    work()
    return now() - start


def prepare(steps: int, rounds: int) -> BenchmarkSetup:
    """Return the networks and images: CIFAR-10 and published weights if QADTR_BREVITAS_DATA names them."""
    torch.manual_seed(0)
    net = float_model()
    folder = os.environ.get("QADTR_BREVITAS_DATA")
    trained = folder is not None and (Path(folder) / WEIGHTS).is_file()
    if trained:
        load_into(net.net, load_weights(Path(folder) / WEIGHTS), source=WEIGHTS, name="cifar_resnet20")
    data = Cifar10() if trained else Shapes(train_images=5000, test_images=2000)
    net.eval().requires_grad_(False)
    loaded = copy.deepcopy(net)
    net.to(memory_format=torch.channels_last)
    model = convert(copy.deepcopy(net.net), DEFAULT_BITS)
    # In the order of the files classes follow each other, which would favor attacks that draw their own batches.
    train, test = (
        split.subset(torch.randperm(len(split), generator=generator(0, "order")))
        for split in (data.load("train"), data.load("test"))
    )
    return BenchmarkSetup(net, loaded, model.eval(), train, test, trained, clock(torch.device("cpu")), steps, rounds)


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="steps in a round")
    parser.add_argument("--art-steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("bench_attacks.json"))
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    setup = prepare(arguments.steps, arguments.rounds)
    seconds = step_times(setup)
    race = art_race(setup, arguments.art_steps)
    scoring = scoring_ratios(setup, arguments.images, max(1, arguments.rounds // 3))
    result = {"step_s": seconds, "race": race, "scoring_ratios": scoring, "arguments": vars(arguments)}
    arguments.output.write_text(json.dumps(result, indent=2, default=str) + "\n")
    print("patch steps per second, and share of the ceiling")
    for name, value in seconds.items():
        print(f"  {name:18} {1 / value:7.1f}/s {seconds['ceiling'] / value:6.1%}")
    if race:
        print(f"ART: ASR {race['art_asr']:.1%} after {race['art_s']:.1f} s")
        print(f"LAVAN: ASR {race['asr']:.1%} after {race['s']:.1f} s, {race['s'] / race['art_s']:.2f} of that")
    for name, ratio in scoring.items():
        print(f"one patch scored at five precisions: {ratio:.2f} x five clean float passes, {name}")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
