"""The audit: does a low success rate mean a robust network, or an attack that failed?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeAlias

import torch

from qadtr_brevitas.audit.checks import CHECKS
from qadtr_brevitas.audit.context import Context
from qadtr_brevitas.audit.finding import AuditReport, Finding, PrecisionAudit
from qadtr_brevitas.audit.profile import ProfileName, find_profile
from qadtr_brevitas.audit.significance import resolution
from qadtr_brevitas.audit.store import AuditStore
from qadtr_brevitas.audit.victim import Audited, Victim, held_still, name_of, victims
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.metrics import Share
from qadtr_brevitas.precision import PrecisionLike
from qadtr_brevitas.report import Rate
from qadtr_brevitas.subjects import Subject

DEFAULT_IMAGES = 200

Progress: TypeAlias = Callable[[int, int, str], object]
"""Is told finished checks, all checks, and which one comes next."""


def audit(
    model: Audited,
    split: Split,
    *,
    precisions: Sequence[PrecisionLike] | None = None,
    twin: Audited | None = None,
    surrogates: Sequence[Audited] = (),
    ablations: Sequence[Audited] = (),
    images: int = DEFAULT_IMAGES,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    profile: ProfileName = "quick",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Runs the checks G1 to G19 on a model at each precision, on the same images at the same places.

    A check warns where a difference is more than its threshold and more than the noise of so many images; the numbers
    hold both. What a check could not measure it skips, with the reason.

    Args:
        model: a loaded model, a network, or any function from images (N, 3, H, W) in [0, 1] to logits. A network is
            put in eval mode on the device meanwhile, and none of its parameters gets a gradient.
        split: the images; `images` of them are drawn, balanced over the classes.
        precisions: precisions to audit; None for all that a switchable model allows.
        twin: the same network without the defense.
        surrogates: other networks, to take patches and gradients from.
        ablations: the same network with a part of the defense left out.
        images: how many images; those classified correctly are attacked.
        seed: decides images, places and starts.
        batch_size: images in one pass.
        device: where to compute.
        profile: how much to spend; `quick` takes about 300 forward and backward and
            150 forward passes of each image.
        folder: keeps the finished precisions of loaded models, so that a stopped audit goes on.
        progress: told after each check.

    Raises:
        UsageError: a precision that is not allowed, an unknown profile, or more images than there are.
        DataError: a model is for other images or another number of classes.
        CheckpointError: the folder cannot be written.
    """
    spending = find_profile(profile)
    chosen = split.balanced(min(images, len(split)), seed=seed)
    parts = [model, *([] if twin is None else [twin]), *surrogates, *ablations]
    for part in parts:
        if isinstance(part, Subject):
            part.check_data(split, data="given here")
    store = AuditStore.of(
        folder, model, twin, surrogates, ablations, split=chosen, settings=(asdict(spending), seed, batch_size)
    )
    batch, labels = chosen.batch(torch.arange(len(chosen)), device=device)
    found = victims(model, precisions=precisions, twin=twin, surrogates=surrogates, ablations=ablations)
    audits: list[PrecisionAudit] = []
    with held_still(parts, device=device):
        for number, victim in enumerate(found):
            victim.check_classes(batch)

            def report(done: int, note: str, offset: int = number * len(CHECKS)) -> None:
                if progress is not None:
                    progress(offset + done, len(found) * len(CHECKS), note)

            context = Context(victim, spending, batch, labels, seed, batch_size)
            audits.append(store.get(victim, lambda context=context, report=report: _audit(context, report)))
            report(len(CHECKS), "")
    return AuditReport(
        model=name_of(model),
        fingerprint=model.fingerprint if isinstance(model, Subject) else None,
        profile=profile,
        settings=asdict(spending),
        seed=seed,
        images=len(chosen),
        precisions=tuple(audits),
    )


def _audit(context: Context, report: Callable[[int, str], None]) -> PrecisionAudit:
    """All checks of one precision."""
    findings: list[Finding] = []
    for done, check in enumerate(CHECKS):
        report(done, f"{_where(context.victim)}, {check.id} {check.title}")
        findings.append(check.run(context))
    n, victim = len(context), context.victim
    attacked = any(
        finding.status != "skipped" for check, finding in zip(CHECKS, findings, strict=True) if check.attacks
    )
    return PrecisionAudit(
        precision=None if victim.precision is None else str(victim.precision),
        clean_accuracy=Rate.of(Share(n, len(context.batch))),
        asr=Rate.of(Share(int(context.white_box.sum()), n) if attacked else Share(0, 0)),
        worst_case=Rate.of(Share(int(context.worst_case.sum()), n) if attacked else Share(0, 0)),
        side=context.size[0],
        resolution=resolution(n) if n else None,
        passes={"forward": victim.passes.forward, "forward and backward": victim.passes.gradient},
        findings=tuple(findings),
    )


def _where(victim: Victim) -> str:
    return victim.name if victim.precision is None else f"{victim.name} at {victim.precision} bit"
