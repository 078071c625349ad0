"""Measure what a certificate costs: forward passes and time per image, against the two-mask test as it is defined.

    make bench                       # or: python benchmarks/benchmark_certify.py --images 32 --model runs/masked

ResNet-20 at 4 bit against patches of 5x5 pixels, 36 masks, weights frozen, on the same images:

(a) naive: each image under all 36 * 36 ordered pairs of masks (PatchCleanser, Theorem 1), batches of one image;
(b) ours: a pair once, the filter of single masks first, the least sure pairs first, several images in a batch;
(c) one round of 30 masks (evaluation/one_round.py).

The bar: (b) takes at most a third of the passes of (a). A proved image takes 666 of 1296 passes whatever the order, so
that the ratio rises with the share that is proved: --model names a trained run, for instance a masked one, in place of
the published float weights, calibrated (random weights if QADTR_BREVITAS_DATA does not name them). Times are processor
seconds of one CPU thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark import clock
from benchmark_attacks import prepare
from torch import Tensor

from qadtr_brevitas.core.device import keep_freed_memory
from qadtr_brevitas.evaluation.entries import load_subjects
from qadtr_brevitas.evaluation.mask_fill import MaskFill
from qadtr_brevitas.evaluation.masked_predictor import Certified
from qadtr_brevitas.evaluation.masks import covering_masks, mean_color
from qadtr_brevitas.evaluation.one_round import line_masks, one_round
from qadtr_brevitas.evaluation.patch_cleanser import double_masking
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, frozen_weights

PATCH, BITS, BAR = 5, 4, 1 / 3


def naive_test(model: Callable[[Tensor], Tensor], images: Tensor, masks: Tensor, fill: Tensor) -> Certified:
    """The two-mask test of each image by itself under all ordered pairs, and its passes."""
    proved: list[int] = []
    for image in images:
        found = [model(torch.where((masks | mask)[:, None], fill, image)).argmax(dim=1) for mask in masks]
        seen = torch.cat(found)
        proved.append(int(seen[0]) if bool((seen == seen[0]).all()) else -1)
    passes = torch.full((len(images),), len(masks) ** 2)
    return Certified(torch.tensor(proved), torch.tensor(proved), passes)


def subject(path: Path | None) -> tuple[SwitchableModel, Any, Any]:
    """Return the network, its mean color and shuffled test images."""
    setup = prepare(steps=1, rounds=1)
    if path is not None:
        loaded = load_subjects([path])[0]
        return loaded.model, loaded.info.mean, setup.test
    calibrate(setup.model, setup.train.batch(torch.arange(512))[0].split(128))
    return setup.model.eval(), setup.net.mean.flatten().tolist(), setup.test


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--model", type=Path, help="a run or model directory")
    parser.add_argument("--output", type=Path, default=Path("bench_certify.json"))
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    model, mean, test = subject(arguments.model)
    images, labels = test.batch(torch.arange(arguments.images))
    now, color = clock(torch.device("cpu")), mean_color(mean)
    fill = MaskFill(color)
    pairs, lines = covering_masks((32, 32), PATCH), line_masks((32, 32), PATCH)
    methods = {
        "naive": lambda: naive_test(model, images, pairs, color),
        "double masking": lambda: double_masking(model, images, pairs, fill=fill),
        "one round": lambda: one_round(model, images, lines, PATCH, fill=fill),
    }
    result: dict[str, Any] = {}
    with torch.no_grad(), at_precision(model, BITS), frozen_weights(model):
        model(images[:1])
        for name, method in methods.items():
            start = now()
            found = method()
            assert found.passes is not None
            result[name] = {
                "passes": found.passes.double().mean().item(),
                "seconds": (now() - start) / len(images),
                "certified": (found.proved == labels).double().mean().item(),
            }
    naive = result["naive"]
    print(f"per image of {len(images)}, {PATCH}x{PATCH}, {BITS} bit")
    for name, figures in result.items():
        shares = figures["passes"] / naive["passes"], figures["seconds"] / naive["seconds"]
        print(
            f"  {name:15} {figures['passes']:7.1f} passes ({shares[0]:5.1%} of naive) {figures['seconds']:6.2f} s "
            f"({shares[1]:5.1%}), certified {figures['certified']:.1%}"
        )
    ratio = result["double masking"]["passes"] / naive["passes"]
    print(f"bar: at most {BAR:.1%} of the naive passes: {'met' if ratio <= BAR else 'MISSED'}")
    arguments.output.write_text(json.dumps({**result, "arguments": vars(arguments)}, indent=2, default=str) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
