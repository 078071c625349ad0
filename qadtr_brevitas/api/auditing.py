"""`audit`: is a low attack success rate robustness, or an attack that failed? From Python."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

from rich.console import Console

from qadtr_brevitas.api.inputs import ModelLike, as_loaded, as_split, prepared
from qadtr_brevitas.auditing import AuditReport
from qadtr_brevitas.auditing import audit as audit_loaded
from qadtr_brevitas.auditing.headline import audit_headline
from qadtr_brevitas.auditing.profile import ProfileName
from qadtr_brevitas.core.device import resolve_device
from qadtr_brevitas.core.precision import PrecisionLike
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.batches import Loader

_WIDTH = 100


class AuditResult(AuditReport):
    """The findings of an audit; `str()` says in short what they mean."""

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=_WIDTH).print(audit_headline(self).rich())
        return text.getvalue()


def audit(
    model: ModelLike,
    loader: Loader,
    *,
    precisions: Sequence[PrecisionLike] | None = None,
    undefended: ModelLike | None = None,
    images: int = 200,
    profile: ProfileName = "quick",
    seed: int = 0,
    batch_size: int = 256,
    device: str = "auto",
    progress: Progress | None = None,
) -> AuditResult:
    """Run the checks G1 to G22 on a model at each precision.

    Args:
        model: a switchable model, or the folder of one; left as it was.
        loader: labeled test images; pixels in [0, 1] or uint8.
        precisions: precisions to audit; None for all of the model.
        undefended: the same network without the defense, which the audit's attack has to break.
        images: how many images to draw, class-balanced; those that are classified correctly are attacked.
        profile: how much to spend on the attacks inside.
        seed: of images, places and starts.
        batch_size: images in one pass.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        progress: called after each check.

    Returns:
        For each precision the finding of every check: passed, a warning with its numbers, or skipped with the reason.
        Printed, it says first what the attacks inside break, and whether that can be trusted.

    Raises:
        UsageError: a precision that the model lacks, or a model that was not converted.
        DataError: images or labels do not fit the model.
    """
    where = resolve_device(device)
    loaded = as_loaded(model)
    twin = None if undefended is None else as_loaded(undefended, name="undefended")
    with prepared([loaded, *([] if twin is None else [twin])], device=where):
        found = audit_loaded(
            loaded,
            as_split(loader, loaded, images=None, seed=seed),
            precisions=precisions,
            twin=twin,
            images=images,
            seed=seed,
            batch_size=batch_size,
            device=where,
            profile=profile,
            progress=progress,
        )
    return AuditResult(**dict(found))
