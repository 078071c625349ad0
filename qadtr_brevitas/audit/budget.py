"""G3: larger patches must break more images, and the largest all of them."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from qadtr_brevitas.attacks.shapes import side_for_share
from qadtr_brevitas.audit.context import PATCH_SHARE, Context
from qadtr_brevitas.audit.finding import Verdict
from qadtr_brevitas.audit.patch_search import Scene
from qadtr_brevitas.audit.significance import Gain, deviations, rate

SHARES = (1 / 64, 9 / 256, PATCH_SHARE, 9 / 64)
"""Shares of the pixels: sides of 4, 6, 8 and 12 on an image of 32x32."""

FULL_IMAGE_ASR = 0.99


def larger_patches(context: Context) -> Verdict:
    """Success by the size of the patch, up to the whole image."""
    sides = dict.fromkeys(side_for_share(max(share, _one_pixel(context)), context.image_size) for share in SHARES)
    found = {f"{side}x{side}": _broken(context, (side, side)) for side in sides}
    found["whole image"] = _broken(context, context.image_size)
    numbers = {f"asr {name}": rate(broken) for name, broken in found.items()}
    names = list(found)
    falls = {
        f"{smaller} to {larger}": Gain.of(found[smaller], found[larger], comparisons=len(names) - 1)
        for smaller, larger in pairwise(names)
    }
    fall = max(falls, key=lambda name: falls[name].value - falls[name].noise)
    left = 1 - rate(found["whole image"])
    noise = deviations() * math.sqrt(FULL_IMAGE_ASR * (1 - FULL_IMAGE_ASR) / len(context))
    numbers |= {"largest fall": falls[fall].value, "noise of the fall": falls[fall].noise, "noise of the whole": noise}
    if left > 1 - FULL_IMAGE_ASR + noise:
        return Verdict(
            "WARN",
            f"{left:.1%} of the images stay right even where the attacker chooses every pixel: the attack fails, not "
            "the network is robust; look for masked gradients (G8, G12)",
            numbers,
        )
    if falls[fall].exceeds(0):
        return Verdict(
            "WARN", f"a larger patch breaks fewer images ({fall}): the attack does not find what is there", numbers
        )
    return Verdict("pass", "larger patches break more images, and the whole image all of them", numbers)


def _broken(context: Context, size: tuple[int, int]) -> Tensor:
    """Images broken by patches of a size."""
    if size == context.size:
        return context.compared
    scene = Scene(context.scene.images, context.scene.labels, context.corners(size))
    steps = context.profile.compared_steps
    trace = context.search(context.victim.logits, steps=steps, scene=scene, start=context.start(size=size))
    # Larger patches are no attack within the budget: they do not count for the worst case.
    return context.is_wrong(scene.put(trace.best[steps]), scene.labels).cpu()


def _one_pixel(context: Context) -> float:
    return 1 / (context.image_size[0] * context.image_size[1])
