"""G8 and G16: gradients that are not there, and a loss too rough for them to mean anything.

G12 and G14: other losses than the cross-entropy of the true class.

G11: whether a network gives logits.

G9 and G10: networks that answer differently each time, and attacks on the mean of the answers (EOT).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.auditing.context import FORWARDS, RANDOM_ABOVE, AuditContext
from qadtr_brevitas.auditing.finding import Verdict, skipped
from qadtr_brevitas.auditing.search import DLR_CLASSES, Objective, dlr, margin, tempered, towards
from qadtr_brevitas.auditing.significance import compare, deviations

NOISE_WIDTH = 8 / 255
ROUGH_ABOVE = 0.1


def usable_gradients(context: AuditContext) -> Verdict:
    """Images whose patch has no gradient to start with, or one that is no number."""
    trace = context.longest
    zero, broken = int(trace.zero[0].sum()), int(trace.broken.any(0).sum())
    numbers = {
        "images without gradient": float(zero),
        "images with NaN or infinite gradient": float(broken),
        "images": float(len(context)),
        "share of steps without gradient": trace.zero.float().mean().item(),
    }
    if zero or broken:
        return Verdict(
            "WARN",
            f"{zero} images give the patch no gradient and {broken} one that is no number: the attack is blind there; "
            "use a margin loss or a lower temperature (G12), another source (G13) or no gradients at all (G5)",
            numbers,
        )
    return Verdict("pass", "every image gives its patch a finite gradient that is not zero", numbers)


def smooth_loss(context: AuditContext) -> Verdict:
    """Mean relative change of the margin in random directions in the patch (after IoAF, Pintor et al. 2022).

    The margin, because the cross-entropy of a confident network is too small to be divided by.
    """
    start = context.start()
    center = _margins(context, start)
    draw, directions = context.generator("directions"), context.profile.directions
    changes = torch.zeros_like(center)
    for _ in range(directions):
        noise = torch.rand(len(context.batch), *start.shape[1:], generator=draw).to(start.device)[context.correct]
        moved = _margins(context, (start + (noise - 0.5) * NOISE_WIDTH).clamp(0, 1))
        changes += (moved - center).abs() / directions
    sizes = center.abs()
    change = (changes.sum() / sizes.sum()).item()
    # Of a ratio of two means, by its linear part.
    spread = (changes - change * sizes).std(unbiased=False) / sizes.mean()
    noise_of_change = deviations() * spread.item() / math.sqrt(len(context))
    numbers = {"relative change": change, "noise": noise_of_change, "directions": float(directions)}
    if change - noise_of_change > ROUGH_ABOVE:
        return Verdict(
            "WARN",
            f"noise of {NOISE_WIDTH:.3f} in the patch changes the loss by {change:.0%}: gradients tell little of the "
            "way ahead; average them over noise or draws, or attack without gradients (G5)",
            numbers,
        )
    return Verdict("pass", "the loss changes little under small noise, so gradients mean something", numbers)


def _margins(context: AuditContext, patches: Tensor) -> Tensor:
    """(n,) margins of patched images, in double precision on the CPU."""
    found: list[Tensor] = []
    with torch.no_grad():
        for chunk in torch.arange(len(patches), device=patches.device).split(context.batch_size):
            scene = context.scene.only(chunk)
            found.append(margin(context.victim.logits(scene.put(patches[chunk])), scene.labels).cpu().double())
    return torch.cat(found)


TEMPERATURES = (0.01, 0.1, 10.0, 100.0)
LOSS_THRESHOLD, TARGETED_THRESHOLD = 0.01, 0.01


def other_losses(context: AuditContext) -> Verdict:
    """Logits times a factor in the cross-entropy (Gupta and Ajanthan 2020), the margin, and its ratio (DLR)."""
    objectives: dict[str, Objective] = {f"logits x {factor:g}": tempered(factor) for factor in TEMPERATURES}
    objectives["margin"] = margin
    with torch.no_grad():
        classes = context.victim.logits(context.batch[:1]).shape[1]
    if classes >= DLR_CLASSES:
        objectives["dlr"] = dlr
    found = {name: context.attack(context.victim.logits, objective=loss) for name, loss in objectives.items()}
    comparison = compare(context.compared, found, base_name="cross-entropy", threshold=LOSS_THRESHOLD)
    if comparison.is_better:
        return Verdict(
            "WARN",
            f"the loss '{comparison.best}' breaks more images than cross-entropy, whose gradients the scale of the "
            "logits spoils: report the attack with that loss",
            comparison.numbers,
        )
    return Verdict("pass", "no temperature and no margin loss is better than cross-entropy", comparison.numbers)


def targeted(context: AuditContext) -> Verdict:
    """The most likely wrong class as target, any wrong class as success."""
    scene = replace(context.scene, aims=_likeliest_wrong(context))
    found = {"likeliest wrong class": context.attack(context.victim.logits, objective=towards, scene=scene)}
    comparison = compare(context.compared, found, base_name="untargeted", threshold=TARGETED_THRESHOLD)
    if comparison.is_better:
        return Verdict(
            "WARN",
            "aiming at the likeliest wrong class breaks more images than aiming away from the right one: report the "
            "better of the two for each image",
            comparison.numbers,
        )
    return Verdict("pass", "aiming at the likeliest wrong class is no better", comparison.numbers)


def _likeliest_wrong(context: AuditContext) -> Tensor:
    """(n,) the wrong class with the largest logit on each clean image."""
    scene = context.scene
    with torch.no_grad():
        logits = torch.cat([context.victim.logits(batch) for batch in scene.images.split(context.batch_size)])
    return logits.scatter(1, scene.labels[:, None], -torch.inf).argmax(1)


TOLERANCE = 1e-5


def outputs_are_logits(context: AuditContext) -> Verdict:
    """Rows that sum to 1 and stay in [0, 1] are probabilities (as AutoAttack's check, Croce and Hein 2020)."""
    with torch.no_grad():
        outputs = context.victim.logits(context.batch[: context.batch_size]).cpu().double()
    off = (outputs.sum(1) - 1).abs().max().nan_to_num().item()
    low, high = outputs.min().nan_to_num().item(), outputs.max().nan_to_num().item()
    numbers = {"largest distance of a sum from 1": off, "smallest output": low, "largest output": high}
    if off < TOLERANCE and low >= 0 and high <= 1:
        return Verdict(
            "WARN",
            "the outputs are probabilities: losses on them saturate and their gradients vanish, give the logits",
            numbers,
        )
    return Verdict("pass", "the outputs are logits, not probabilities", numbers)


EOT_THRESHOLD = 0.01


def random_outputs(context: AuditContext) -> Verdict:
    """Several forwards on one batch (as AutoAttack's check, Croce and Hein 2020)."""
    numbers = {"difference of outputs": context.difference, "forwards": float(FORWARDS)}
    if context.is_random:
        return Verdict(
            "WARN",
            f"the same images give other outputs each time (more than {RANDOM_ABOVE:g}): attack the mean over many "
            "forwards or over the precisions (EOT), one gradient at a time is noise",
            numbers,
        )
    return Verdict("pass", "the same images give the same outputs", numbers)


def mean_over_precisions(context: AuditContext) -> Verdict:
    """The attack that broke EMPIR (Tramer et al. 2020, section 12): all precisions' outputs in one loss."""
    victim = context.victim
    if context.is_random:
        draws = context.profile.draws
        found = context.attack(mean_of([victim.logits] * draws))
        comparison = compare(context.compared, {f"mean of {draws} draws": found}, base_name="one draw")
        return Verdict(
            "WARN",
            "the network draws anew for each forward, so an attack without EOT says nothing of its robustness: report "
            "the attack on the mean of many draws",
            comparison.numbers,
        )
    if not victim.others:
        return skipped("needs a network with several precisions or with random outputs")
    found = context.attack(mean_of([victim.logits, *victim.others.values()]))
    comparison = compare(
        context.compared, {"mean over precisions": found}, base_name="this precision", threshold=EOT_THRESHOLD
    )
    if comparison.is_better:
        return Verdict(
            "WARN",
            "patches made on the mean over all precisions break more images than patches made at this one: report "
            "them (write the precisions as 8+4+2), the gradients at this precision mislead",
            comparison.numbers,
        )
    return Verdict("pass", "the mean over all precisions is no better source than this precision", comparison.numbers)


def mean_of(models: list[Model]) -> Model:
    """The mean of the logits of models."""

    def logits(images: Tensor) -> Tensor:
        return torch.stack([model(images) for model in models]).mean(0)

    return logits
