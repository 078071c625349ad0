"""The options of `evaluate` and `evaluate --audit`, their checks, and the run of the audit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from qadtr_brevitas.cli.common import option_block, progress, was_given
from qadtr_brevitas.cli.completion import complete_plugins
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
    certify_images: int | None
    defend: tuple[PatchSize, ...] | None
    images: int | None
    batch_size: int
    shard: str | None
    cells: tuple[Path, ...]
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


def check_clean(given: EvaluateOptions) -> None:
    """Refuses --clean together with anything that attacks.

    Raises:
        UsageError: both are given.
    """
    attacking = {"--patches": given.patches, "--attack": given.attacks, "--audit": given.audit}
    if given.clean and (also := [name for name, value in attacking.items() if value]):
        raise UsageError(f"--clean measures accuracy without an attack: remove {also[0]} or --clean")


def check_certify(given: EvaluateOptions) -> None:
    """Refuses what only certification uses where nothing is certified.

    Raises:
        UsageError: an option of certification without --certify.
    """
    for option in ("--certify-masks", "--certify-method", "--certify-fill", "--certify-images"):
        # The defended prediction has masks and a method too.
        used = given.certify or (given.defend and option != "--certify-images")
        if was_given(option.removeprefix("--").replace("-", "_")) and not used:
            raise UsageError(f"{option} needs --certify: add it, for instance --certify 8, or remove {option}")


class Numbers(click.ParamType[tuple[int | float, ...]]):
    """Numbers with commas between them, as 6,12,18.

    Args:
        kind: int or float.
        rule: what they have to be, in words.
        least: the smallest allowed; None for any but 0.
        count: how many; None for any number of them.
    """

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], rule: str, *, least: int | None = None, count: int | None = None):
        self.kind, self.rule, self.least, self.count = kind, rule, least, count

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | float, ...]:
        """Read them."""
        try:
            found = tuple(self.kind(word) for word in value.split(","))
        except ValueError:
            found = ()
        if not found or len(found) != (self.count or len(found)) or not all(map(self._is_allowed, found)):
            self.fail(f"{value!r} is not {self.rule}", param, ctx)
        return tuple(dict.fromkeys(found)) if self.count is None else found

    def _is_allowed(self, number: float) -> bool:
        return math.isfinite(number) and (number != 0 if self.least is None else number >= self.least)


class PatchSizes(click.ParamType[tuple[PatchSize, ...]]):
    """Sizes of patches with commas between them, as 5,3x10."""

    name = "sizes"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[PatchSize, ...]:
        """Read them."""
        try:
            return tuple(dict.fromkeys(map(PatchSize.parse, value.split(","))))
        except UsageError as error:
            self.fail(str(error), param, ctx)


patch_size_option = click.option(
    "--patch-size",
    "patch_sizes",
    metavar="SIZE[,SIZE...]",
    type=PatchSizes(),
    help="Scale patches of your own to fit into these sizes, as 8 or 6x10.",
)
"""--patch-size, of patches of one's own."""

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

certify_options = option_block(
    click.option(
        "--certify",
        metavar="SIZE[,SIZE...]",
        type=PatchSizes(),
        help="Prove which predictions no patch of this size can change, as 6 or 3x10; with 6 masks along a side, up to "
        "666 forward passes of each image.",
    ),
    click.option(
        "--certify-masks",
        type=click.IntRange(min=2),
        help="Masks along each side of an image for --certify; more prove more and take longer.  [default: 6, in one "
        "round 5]",
    ),
    click.option(
        "--certify-method",
        type=click.Choice(["double-masking", "one-round"]),
        default="double-masking",
        show_default=True,
        help="PatchCleanser's double masking, or one round of 30 passes under larger masks.",
    ),
    click.option(
        "--certify-fill",
        type=click.Choice(["mean", "interpolate"]),
        default="mean",
        show_default=True,
        help="What masks show: the mean color, as PatchCleanser does, or pixels interpolated from visible ones; best "
        "what train.masks.fill was.",
    ),
    click.option(
        "--certify-images",
        type=click.IntRange(min=1),
        help="Certify so many of the test images only, balanced over classes; more later take up where these end.",
    ),
    click.option(
        "--defend",
        metavar="SIZE[,SIZE...]",
        type=PatchSizes(),
        help="Score the prediction defended against patches of this size too, as a model of its own: what is made on "
        "others, and on itself through the masks, meets it. Tens of forward passes for each.",
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


def check_audit_options(given: EvaluateOptions) -> None:
    """Refuses what only an audit uses where there is none.

    Raises:
        UsageError: an option of the audit without --audit.
    """
    names = {"twin": "--twin", "ablations": "--ablation"} | {
        name: "--" + name.replace("_", "-") for name in ("audit_images", "audit_profile")
    }
    for name, option in names.items():
        if was_given(name) and not given.audit:
            raise UsageError(f"{option} needs --audit: add it, or remove {option}")


def run_audits(grid: Grid, given: EvaluateOptions, *, output: Path, device: torch.device) -> list[AuditReport]:
    """Audits each model of an evaluation at the precisions asked for; the other models lend it their gradients."""
    from qadtr_brevitas.auditing import audit
    from qadtr_brevitas.evaluation.defended import DefendedModel
    from qadtr_brevitas.evaluation.entries import load_models

    precisions = _single(grid)
    twin = load_models([given.twin], device=device)[0] if given.twin else None
    ablations = load_models(given.ablations, device=device)
    audits: list[AuditReport] = []
    with progress("auditing") as report:
        undefended = [loaded for loaded in grid.loaded_models if not isinstance(loaded.model, DefendedModel)]
        for number, loaded in enumerate(undefended):
            known = [loaded, *([twin] if twin else [])]
            audits.append(
                audit(
                    loaded,
                    grid.split,
                    precisions=precisions,
                    twin=twin,
                    surrogates=_others([*undefended, *grid.surrogates], known),
                    ablations=ablations,
                    images=given.audit_images,
                    seed=grid.seed,
                    batch_size=grid.batch_size,
                    device=device,
                    profile=given.audit_profile,
                    folder=output,
                    progress=part_of(report, number, len(undefended)),
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
