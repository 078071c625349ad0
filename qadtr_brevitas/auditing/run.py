"""The audit: does a low success rate mean a robust network, or an attack that failed?

Finished precisions of an audit, kept so that a stopped one goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from qadtr_brevitas import __version__
from qadtr_brevitas.auditing.checks import CHECKS
from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.finding import (
    AUDIT_SCHEMA_VERSION,
    AuditReport,
    Finding,
    PrecisionAudit,
    ProfileName,
    find_profile,
)
from qadtr_brevitas.auditing.significance import resolution
from qadtr_brevitas.auditing.victim import Audited, AuditedModel, held_still, name_of, victims
from qadtr_brevitas.core.files import fingerprint_facts, fingerprint_tensors, write_json
from qadtr_brevitas.core.precision import PrecisionLike
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.metrics import Proportion
from qadtr_brevitas.evaluation.report import Rate

AUDIT_FOLDER = "audit"


@dataclass(frozen=True)
class AuditStore:
    """A folder of finished precisions; without one nothing is kept.

    Args:
        folder: where; None for nowhere.
        facts: all that the findings depend on but the precision.
    """

    folder: Path | None
    facts: Any

    @classmethod
    def of(
        cls,
        folder: Path | None,
        model: Audited,
        twin: Audited | None,
        surrogates: Sequence[Audited],
        ablations: Sequence[Audited],
        *,
        split: Split,
        settings: Any,
    ) -> AuditStore:
        """The store of an audit; models that were not loaded have no fingerprint and are not kept."""
        parts = [model, *([] if twin is None else [twin]), *surrogates, *ablations]
        if folder is None or not all(isinstance(part, LoadedModel) for part in parts):
            return cls(None, None)
        images = fingerprint_tensors([split.images, split.labels])
        groups = [
            [_named(part) for part in group] for group in ([model], [twin] if twin else [], surrogates, ablations)
        ]
        return cls(folder / AUDIT_FOLDER, [AUDIT_SCHEMA_VERSION, __version__, groups, images, settings])

    def get(self, victim: AuditedModel, compute: Callable[[], PrecisionAudit]) -> PrecisionAudit:
        """The finished audit of a precision, or that of `compute`, which is kept.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{fingerprint_facts([self.facts, str(victim.precision)])}.json"
        try:
            return PrecisionAudit.model_validate_json(path.read_bytes())
        # A damaged file costs its time again, not the audit.
        except (OSError, ValidationError):
            found = compute()
        write_json(path, found.model_dump(mode="json"))
        return found


def _named(part: Audited) -> tuple[str, str]:
    assert isinstance(part, LoadedModel)
    return part.name, part.fingerprint


DEFAULT_IMAGES = 200

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
        if isinstance(part, LoadedModel):
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

            context = AuditContext(victim, spending, batch, labels, seed, batch_size)
            audits.append(store.get(victim, lambda context=context, report=report: _audit(context, report)))
            report(len(CHECKS), "")
    return AuditReport(
        model=name_of(model),
        fingerprint=model.fingerprint if isinstance(model, LoadedModel) else None,
        profile=profile,
        settings=asdict(spending),
        seed=seed,
        images=len(chosen),
        precisions=tuple(audits),
    )


def _audit(context: AuditContext, report: Callable[[int, str], None]) -> PrecisionAudit:
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
        clean_accuracy=Rate.of(Proportion(n, len(context.batch))),
        asr=Rate.of(Proportion(int(context.white_box.sum()), n) if attacked else Proportion(0, 0)),
        worst_case=Rate.of(Proportion(int(context.worst_case.sum()), n) if attacked else Proportion(0, 0)),
        side=context.size[0],
        resolution=resolution(n) if n else None,
        passes={"forward": victim.passes.forward, "forward and backward": victim.passes.gradient},
        findings=tuple(findings),
    )


def _where(victim: AuditedModel) -> str:
    return victim.name if victim.precision is None else f"{victim.name} at {victim.precision} bit"
