"""The audit: does a low success rate mean a robust network, or an attack that failed?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from qadtr_brevitas.auditing.audited_model import (
    AuditedModel,
    ModelToAudit,
    audited_models,
    evaluation_mode,
    name_of,
)
from qadtr_brevitas.auditing.checks import CHECKS
from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.finding import AuditReport, Finding, PrecisionAudit
from qadtr_brevitas.auditing.profile import ProfileName, find_profile
from qadtr_brevitas.auditing.significance import resolution
from qadtr_brevitas.auditing.store import AuditStore
from qadtr_brevitas.core.precision import PrecisionLike
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.metrics import Proportion
from qadtr_brevitas.evaluation.report import Rate

DEFAULT_IMAGES = 200


def audit(
    model: ModelToAudit,
    split: Split,
    *,
    precisions: Sequence[PrecisionLike] | None = None,
    twin: ModelToAudit | None = None,
    surrogates: Sequence[ModelToAudit] = (),
    ablations: Sequence[ModelToAudit] = (),
    images: int = DEFAULT_IMAGES,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    profile: ProfileName = "quick",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Run the checks G1 to G22 on a model at each precision, on the same images; all but G22 at the same places.

    A check warns if a difference is larger than its threshold and larger than chance could make it on so many images;
    the numbers hold both. A check that cannot measure anything is skipped, with the reason.

    Args:
        model: a loaded model, a network, or any function from images (N, C, H, W) in [0, 1] to logits. A network is
            put in eval mode on the device during the audit, and none of its parameters receives a gradient.
        split: labeled test images; `images` of them are drawn, balanced over the classes.
        precisions: precisions to audit; None for all that a switchable model allows.
        twin: the undefended twin: the same network trained on the same data without the defense. An attack that cannot
            break it is too weak to show anything about the defense.
        surrogates: other networks that patches and gradients are taken from.
        ablations: the same network with a part of the defense left out.
        images: number of images; those that are classified correctly are attacked.
        seed: decides images, places and starts.
        batch_size: images in one pass.
        device: where to compute.
        profile: how much to spend; `quick` takes about 350 forward and backward and 150 forward passes of each image,
            up to 100 and 300 more of those that PGD does not break, and up to 101 and 366 more of those that withstand
            patches at random places.
        folder: where the finished precisions of loaded models are kept, so that an interrupted audit can be resumed;
            None to keep nothing.
        progress: called after each check.

    Raises:
        UsageError: a precision is not allowed, or the profile is unknown.
        DataError: a model is for other images or another number of classes.
        CheckpointError: the folder cannot be written.
    """
    sizes = find_profile(profile)
    chosen = split.balanced(min(images, len(split)), seed=seed)
    parts = [model, *([] if twin is None else [twin]), *surrogates, *ablations]
    for part in parts:
        if isinstance(part, LoadedModel):
            part.check_data(split, data="given here")
    store = AuditStore.of(
        folder,
        model,
        twin,
        surrogates,
        ablations,
        split=chosen,
        settings=(asdict(sizes), seed, batch_size, [check.id for check in CHECKS]),
    )
    batch, labels = chosen.batch(torch.arange(len(chosen)), device=device)
    at_precisions = audited_models(model, precisions=precisions, twin=twin, surrogates=surrogates, ablations=ablations)
    audits: list[PrecisionAudit] = []
    with evaluation_mode(parts, device=device):
        for number, audited in enumerate(at_precisions):
            audited.check_classes(batch)

            def report(done: int, note: str, offset: int = number * len(CHECKS)) -> None:
                if progress is not None:
                    progress(offset + done, len(at_precisions) * len(CHECKS), note)

            context = AuditContext(audited, sizes, batch, labels, seed, batch_size)
            audits.append(store.get(audited, lambda context=context, report=report: _audit_precision(context, report)))
            report(len(CHECKS), "")
    return AuditReport(
        model=name_of(model),
        fingerprint=model.fingerprint if isinstance(model, LoadedModel) else None,
        profile=profile,
        settings=asdict(sizes),
        seed=seed,
        images=len(chosen),
        precisions=tuple(audits),
    )


def _audit_precision(context: AuditContext, report: Callable[[int, str], None]) -> PrecisionAudit:
    """Run all checks at one precision."""
    findings: list[Finding] = []
    for done, check in enumerate(CHECKS):
        report(done, f"{_name_at(context.audited)}, {check.id} {check.title}")
        findings.append(check.run(context))
    n, audited = len(context), context.audited
    attacked = any(
        finding.status != "skipped" for check, finding in zip(CHECKS, findings, strict=True) if check.attacks
    )
    return PrecisionAudit(
        precision=None if audited.precision is None else str(audited.precision),
        clean_accuracy=Rate.of(Proportion(n, len(context.images))),
        asr=Rate.of(Proportion(int(context.broken_by_white_box.sum()), n) if attacked else Proportion(0, 0)),
        worst_case=Rate.of(Proportion(int(context.broken_by_any.sum()), n) if attacked else Proportion(0, 0)),
        side=context.patch_size[0],
        resolution=resolution(n) if n else None,
        passes={"forward": audited.passes.forward, "forward and backward": audited.passes.gradient},
        findings=tuple(findings),
    )


def _name_at(audited: AuditedModel) -> str:
    """Return the name of the model with its precision."""
    return audited.name if audited.precision is None else f"{audited.name} at {audited.precision} bit"
