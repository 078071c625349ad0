"""The audit of `evaluate --audit`: its options, and running it on the models of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qadtr_brevitas.cli.common import option_block, progress, was_given
from qadtr_brevitas.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from qadtr_brevitas.audit import AuditReport
    from qadtr_brevitas.cli.evaluate_options import Options
    from qadtr_brevitas.evaluate import Grid
    from qadtr_brevitas.precision import Precision
    from qadtr_brevitas.subjects import Subject

audit_options = option_block(
    click.option(
        "--audit",
        is_flag=True,
        help="Check whether a low ASR is robustness or an attack that failed: minutes for each model and precision.",
    ),
    click.option(
        "--audit-images", type=click.IntRange(min=20), default=200, show_default=True, help="Images of the audit."
    ),
    click.option(
        "--audit-profile",
        type=click.Choice(["quick", "full"]),
        default="quick",
        show_default=True,
        help="Steps, queries and restarts of its attacks.",
    ),
    click.option(
        "--twin",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="The same network without the defense: the audit's attack must break it.",
    ),
    click.option(
        "--ablation",
        "ablations",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="The network trained without a part of the defense: does the part help against black boxes too? Repeat.",
    ),
)


def check_audit_options(given: Options) -> None:
    """Refuses what only an audit uses where there is none.

    Raises:
        UsageError: an option of the audit without --audit.
    """
    names = {"twin": "--twin", "ablations": "--ablation"} | {
        name: "--" + name.replace("_", "-") for name in ("audit_images", "audit_profile")
    }
    for name, option in names.items():
        if was_given(name) and not given.audit:
            raise UsageError(f"{option} is for the audit: add --audit, or leave {option} out")


def run_audits(grid: Grid, given: Options, *, output: Path, device: torch.device) -> list[AuditReport]:
    """Audits each model of an evaluation at the precisions asked for; the other models lend it their gradients."""
    from qadtr_brevitas.audit import audit
    from qadtr_brevitas.subjects import load_subjects

    precisions = _single(grid)
    twin = load_subjects([given.twin], device=device)[0] if given.twin else None
    ablations = load_subjects(given.ablations, device=device)
    audits: list[AuditReport] = []
    with progress("auditing") as report:
        for number, subject in enumerate(grid.subjects):
            known = [subject, *([twin] if twin else [])]
            audits.append(
                audit(
                    subject,
                    grid.split,
                    precisions=precisions,
                    twin=twin,
                    surrogates=_others([*grid.subjects, *grid.surrogates], known),
                    ablations=ablations,
                    images=given.audit_images,
                    seed=grid.seed,
                    batch_size=grid.batch_size,
                    device=device,
                    profile=given.audit_profile,
                    folder=output,
                    progress=_share(report, number, len(grid.subjects)),
                )
            )
    return audits


def _single(grid: Grid) -> list[Precision] | None:
    """The precisions to audit: each by itself, because several together are attacked through each of them."""
    from qadtr_brevitas.sources import parse_access

    if grid.precisions is None:
        return None
    found = [access.precisions[0] for access in map(parse_access, grid.precisions) if access.is_single]
    if not found:
        raise UsageError("--audit looks at one precision at a time: add one to --precision, for instance 8")
    return found


def _others(subjects: Sequence[Subject], known: Sequence[Subject]) -> list[Subject]:
    """The models of other weights than the known ones."""
    seen = {subject.fingerprint for subject in known}
    return [subject for subject in subjects if subject.fingerprint not in seen]


def _share(report: Callable[[int, int, str], object], number: int, models: int) -> Callable[[int, int, str], object]:
    """Progress of one model as a share of that of all."""
    return lambda done, total, note: report(number * total + done, models * total, note)
