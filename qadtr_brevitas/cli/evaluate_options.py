"""The options of `evaluate` and `evaluate --audit`, their checks, and the run of the audit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from qadtr_brevitas.cli.certify_options import MASK_OPTIONS
from qadtr_brevitas.cli.common import check_needed, option_block, progress, say
from qadtr_brevitas.cli.completion import complete_plugins
from qadtr_brevitas.cli.option_values import Numbers, patch_size_option
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.patch_size import PatchSize
from qadtr_brevitas.core.progress import part_of
from qadtr_brevitas.core.registry import ATTACKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from qadtr_brevitas.auditing import AuditReport
    from qadtr_brevitas.core.precision import Precision
    from qadtr_brevitas.evaluation import Grid
    from qadtr_brevitas.evaluation.entries import LoadedModel


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The command line, as click read it."""

    model_dirs: tuple[Path, ...]
    clean: bool
    patches: tuple[Path, ...]
    patch_sizes: tuple[PatchSize, ...] | None
    attacks: tuple[str, ...]
    surrogates: tuple[Path, ...]
    eot: tuple[str, ...]
    ensemble: Literal["fast", "standard", "no"]
    precisions: str | None
    transfer: Literal["all", "float", "none"]
    at: tuple[int, int] | None
    shifts: tuple[int, ...] | None
    degrees: tuple[float, ...] | None
    certify: tuple[PatchSize, ...] | None
    certify_masks: int | None
    certify_method: Literal["double-masking", "one-round"]
    certify_fill: Literal["mean", "interpolate"]
    certify_tta: Literal["none", "flip", "shift", "flip-shift"]
    certify_overlap: int
    certify_images: int | None
    defend: tuple[PatchSize, ...] | None
    images: int | None
    batch_size: int
    shard: str | None
    cells: tuple[Path, ...]
    compiles: bool
    audit: bool
    audit_images: int
    audit_profile: Literal["quick", "full"]
    twin: Path | None
    ablations: tuple[Path, ...]
    show_all: bool
    data: str | None
    output: Path | None
    device: str
    seed: int


def check_options(given: EvaluateOptions) -> None:
    """Refuse options that contradict each other, and those that nothing uses.

    Raises:
        UsageError: --clean beside an attack; an audit beside --defend; an option of the audit, of certificates or of
            masks without these.
    """
    attacking = {"--patches": given.patches, "--attack": given.attacks, "--audit": given.audit}
    if given.clean and (also := [name for name, value in attacking.items() if value]):
        raise UsageError(f"--clean measures accuracy without an attack: remove {also[0]} or --clean")
    if given.audit and given.defend:
        # The adaptive attack is on the two rounds of double masking.
        attack = "adaptive-patch" if given.certify_method == "double-masking" else "location-patch"
        raise UsageError(
            "--audit checks networks, not predictions defended by masks: leave out --defend to audit the network, or "
            f"leave out --audit and attack through the masks, with --defend {given.defend[0]} --attack {attack}"
        )
    check_needed(*MASK_OPTIONS, needs="--certify 8", is_there=bool(given.certify or given.defend))
    check_needed("certify_images", needs="--certify 8", is_there=bool(given.certify))
    check_needed("twin", "ablations", "audit_images", "audit_profile", needs="--audit", is_there=given.audit)


plan_options = option_block(
    click.option("--clean", is_flag=True, help="Measure accuracy without an attack, and nothing else."),
    click.option(
        "--patches",
        multiple=True,
        type=click.Path(path_type=Path),
        help="Patch file or folder, or a picture of your own (transparency is its shape); repeat for more.  [default: "
        "MODEL_DIR/patches of each]",
    ),
    patch_size_option,
    click.option(
        "--attack",
        "attacks",
        multiple=True,
        metavar="NAME|{name: NAME, ...}",
        help="Attack each test image by itself, with the settings as in a recipe; repeat for more; see `list attacks`.",
        shell_complete=complete_plugins(ATTACKS),
    ),
    click.option(
        "--surrogate",
        "surrogates",
        multiple=True,
        type=click.Path(path_type=Path),
        help="Make attacks on this model too, without scoring it; repeat for more.",
    ),
    click.option(
        "--eot",
        multiple=True,
        metavar="8+4+2",
        help="Make each --attack on the mean of the logits over these precisions too; repeat for more.",
    ),
    click.option(
        "--ensemble",
        type=click.Choice(["fast", "standard", "no"]),
        default="fast",
        show_default=True,
        help="Beside an --attack that searches a patch for each image, make the ensemble patch-auto of its size too, "
        "for the worst case; or do not.",
    ),
    click.option(
        "--precision",
        "precisions",
        help="What to score, as 32,8,4,random(8+4),vote(8+4+2).  [default: each precision a model has]",
    ),
    click.option(
        "--transfer",
        type=click.Choice(["all", "float", "none"]),
        default="all",
        show_default=True,
        help="Move everything to models and precisions it was not made on, what was made at 32 bit, or nothing.",
    ),
)

move_options = option_block(
    click.option(
        "--at",
        metavar="ROW,COL",
        type=Numbers(int, "a row and a column, such as 2,2", least=0, count=2),
        help="Score each patch at this fixed place too.",
    ),
    click.option(
        "--shift",
        "shifts",
        metavar="N[,N...]",
        type=Numbers(int, "pixels, at least 1, such as 6,12,18", least=1),
        help="Score each patch so many pixels down and to the right of its fixed place too.",
    ),
    click.option(
        "--rotate",
        "degrees",
        metavar="DEG[,DEG...]",
        type=Numbers(float, "angles other than 0, such as 15,45"),
        help="Score each patch turned by so many degrees too.",
    ),
)

work_division = option_block(
    click.option(
        "--shard",
        metavar="K/N",
        help="Compute the K-th of N shares of the cells only; once all are there, the command without --shard reports.",
    ),
    click.option(
        "--cells",
        multiple=True,
        type=click.Path(path_type=Path),
        help="Use the finished cells of this output folder too; repeat for more.",
    ),
)


all_option = click.option(
    "--all", "show_all", is_flag=True, help="Print every table, and not only the result in short; report.md has them."
)

audit_options = option_block(
    click.option(
        "--audit",
        is_flag=True,
        help="Check whether a low ASR is robustness or an attack that failed: minutes for each model and precision. "
        "Checks networks; not with --defend.",
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


def run_audits(grid: Grid, given: EvaluateOptions, *, output: Path, device: torch.device) -> list[AuditReport]:
    """Audits each model of an evaluation at the precisions asked for; the other models lend it their gradients."""
    from qadtr_brevitas.auditing import audit
    from qadtr_brevitas.evaluation.entries import load_models

    precisions = _single(grid)
    compiling = say if given.compiles else None
    twin = load_models([given.twin], device=device, compiling=compiling)[0] if given.twin else None
    ablations = load_models(given.ablations, device=device, compiling=compiling)
    audits: list[AuditReport] = []
    with progress("auditing") as report:
        for number, loaded in enumerate(grid.loaded_models):
            known = [loaded, *([twin] if twin else [])]
            audits.append(
                audit(
                    loaded,
                    grid.split,
                    precisions=precisions,
                    twin=twin,
                    surrogates=_others([*grid.loaded_models, *grid.surrogates], known),
                    ablations=ablations,
                    images=given.audit_images,
                    seed=grid.seed,
                    batch_size=grid.batch_size,
                    device=device,
                    profile=given.audit_profile,
                    folder=output,
                    progress=part_of(report, number, len(grid.loaded_models)),
                )
            )
    return audits


def _single(grid: Grid) -> list[Precision] | None:
    """Return the precisions to audit: each by itself, because several together are attacked through each of them."""
    from qadtr_brevitas.quant.inference import parse_mode

    if grid.precisions is None:
        return None
    found = [mode.precisions[0] for mode in map(parse_mode, grid.precisions) if mode.is_single]
    if not found:
        raise UsageError("--audit checks single precisions, not ensembles: add one to --precision, for instance 8")
    return found


def _others(loaded_models: Sequence[LoadedModel], known: Sequence[LoadedModel]) -> list[LoadedModel]:
    """Return the models of other weights than the known ones."""
    seen = {loaded.fingerprint for loaded in known}
    return [loaded for loaded in loaded_models if loaded.fingerprint not in seen]
