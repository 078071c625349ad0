"""G3: larger patches must break more images, and the largest all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from qadtr_brevitas.attacks.shapes import side_for_area
from qadtr_brevitas.auditing.context import PATCH_AREA, AuditContext
from qadtr_brevitas.auditing.finding import CheckResult
from qadtr_brevitas.auditing.significance import AsrGain, deviations, rate

AREAS = (1 / 64, 9 / 256, PATCH_AREA, 9 / 64)
"""Shares of the pixels: sides of 4, 6, 8 and 12 on an image of 32x32."""

FULL_IMAGE_ASR = 0.99


def larger_patches(context: AuditContext) -> CheckResult:
    """Compare the success of patches by their size, up to the whole image."""
    sides = dict.fromkeys(side_for_area(max(area, _one_pixel(context)), context.image_size) for area in AREAS)
    broken = {f"{side}x{side}": _broken(context, (side, side)) for side in sides}
    broken["whole image"] = _broken(context, context.image_size)
    numbers = {f"asr {name}": rate(images) for name, images in broken.items()}
    names = list(broken)
    falls = {
        f"{smaller} to {larger}": AsrGain.of(broken[smaller], broken[larger], comparisons=len(names) - 1)
        for smaller, larger in pairwise(names)
    }
    fall = max(falls, key=lambda name: falls[name].value - falls[name].noise)
    left = 1 - rate(broken["whole image"])
    noise = deviations() * math.sqrt(FULL_IMAGE_ASR * (1 - FULL_IMAGE_ASR) / len(context))
    numbers |= {"largest fall": falls[fall].value, "noise of the fall": falls[fall].noise, "noise of the whole": noise}
    if left > 1 - FULL_IMAGE_ASR + noise:
        return CheckResult(
            "WARN",
            f"{left:.1%} of the images are still classified correctly where the attacker chooses every pixel: the "
            "attack fails, the network is not robust; look for masked gradients (G8, G12)",
            numbers,
        )
    if falls[fall].exceeds(0):
        return CheckResult(
            "WARN", f"a larger patch breaks fewer images ({fall}): the attack misses patches that exist", numbers
        )
    return CheckResult("pass", "larger patches break more images, and the whole image all of them", numbers)


def _broken(context: AuditContext, size: tuple[int, int]) -> Tensor:
    """Return the images broken by patches of a size."""
    if size == context.patch_size:
        return context.baseline
    attacked = replace(context.attacked, corners=context.corners(size))
    steps = context.profile.compared_steps
    trace = context.search(context.audited.logits, steps=steps, attacked=attacked, start=context.start(size=size))
    # Larger patches are no attack within the budget: they do not count for the worst case.
    return context.is_wrong(attacked.with_patches(trace.best[steps]), attacked.labels).cpu()


def _one_pixel(context: AuditContext) -> float:
    return 1 / (context.image_size[0] * context.image_size[1])
