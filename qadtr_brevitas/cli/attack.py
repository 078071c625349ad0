"""`qadtr-brevitas attack MODEL_DIR [key=value ...]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qadtr_brevitas.cli.common import (
    command_of,
    compile_option,
    emit,
    examples,
    load_split,
    progress,
    say,
    work_options,
)
from qadtr_brevitas.cli.completion import complete_plugins
from qadtr_brevitas.cli.start import check_data, check_models, load_libraries
from qadtr_brevitas.core.errors import UsageError, suggest
from qadtr_brevitas.core.registry import ATTACKS
from qadtr_brevitas.core.table import Table
from qadtr_brevitas.pipeline.directories import patch_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qadtr_brevitas.evaluation.craft import CraftedPatch

# The defaults of evaluation.craft, which loads torch and so cannot be imported for the help.
_TRAIN_IMAGES = 10_000
_HELD_OUT = 1_000


@click.command(
    "attack",
    epilog=examples(
        "qadtr-brevitas attack runs/qadtr",
        "qadtr-brevitas attack runs/qadtr size=6 steps=1000 --precision 32,4 --target all",
        "qadtr-brevitas attack models/resnet20 --data cifar10:data --target none",
        "qadtr-brevitas attack runs/qadtr size=8 --protocol unseen",
    ),
)
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@click.option(
    "--attack",
    default="lavan",
    show_default=True,
    help="Attack; see `list attacks`.",
    shell_complete=complete_plugins(ATTACKS),
)
@click.option(
    "--precision",
    "precisions",
    help="Precisions to attack, as 32,8,4; 8+4+2 attacks the mean of the logits.  [default: each the model has]",
)
@click.option(
    "--target", "targets", help="Classes to aim at, by number or name; all; none.  [default: the first three]"
)
@click.option(
    "--train-images",
    type=click.IntRange(min=1),
    help=f"Images to make patches on, held in memory: 1.5 GB for 10,000 of 224x224.  [default: {_TRAIN_IMAGES}]",
)
@click.option("--held-out", type=click.IntRange(min=1), help=f"Images to choose patches on.  [default: {_HELD_OUT}]")
@click.option(
    "--protocol",
    type=click.Choice(["unseen"]),
    help="Make patches unlike those of training instead: other sizes, shapes, targets, family and bit-width.",
)
@click.option(
    "--float32",
    is_flag=True,
    help="Make patches in float32 alone; at 32 bit it is bfloat16 where the CPU is faster at that. Scores are float32.",
)
@compile_option
@work_options(data="the one the model was trained on", output="MODEL_DIR/patches, or patches/PROTOCOL in it")
def command(
    model_dir: Path,
    overrides: tuple[str, ...],
    attack: str,
    precisions: str | None,
    targets: str | None,
    train_images: int | None,
    held_out: int | None,
    protocol: str | None,
    float32: bool,
    compiles: bool,
    data: str | None,
    output: Path | None,
    device: str,
    seed: int,
) -> None:
    """Make a patch for each precision and target class of a model.

    Every patch is saved as soon as it is finished: repeat the command to resume an interrupted one.
    Images come from the training split, so that none of them is in the evaluation. The keys of key=value are
    the attack's, for instance size, steps or lr.
    """
    check_models([model_dir])
    check_data(data)
    load_libraries()
    plugin = _make_attack(attack, overrides)

    from qadtr_brevitas.config.slots import slot_name
    from qadtr_brevitas.core.device import resolve_device
    from qadtr_brevitas.core.plugin import plugin_settings
    from qadtr_brevitas.evaluation.craft import DEFAULT_TARGETS, CraftSetup, craft, divide_for_crafting
    from qadtr_brevitas.evaluation.entries import load_models
    from qadtr_brevitas.evaluation.unseen import craft_unseen
    from qadtr_brevitas.pipeline.datasets import find_dataset
    from qadtr_brevitas.quant.inference import parse_modes

    wanted = parse_modes(precisions) if precisions else None
    dataset = find_dataset([model_dir], data, report=say)
    default = patch_folder(model_dir) / protocol if protocol else patch_folder(model_dir)
    output = output or default
    where = resolve_device(device)
    loaded = load_models([model_dir], device=where, compiling=say if compiles else None)[0]
    train, judge = divide_for_crafting(load_split(dataset, "train"), train=train_images, held_out=held_out, seed=seed)
    aims = _read_targets(targets, train.classes)
    named = {"name": slot_name(dataset), "settings": plugin_settings(dataset)}
    with progress("making patches") as report:
        setup = CraftSetup(
            train=train,
            held_out=judge,
            output=output,
            data=named,
            seed=seed,
            device=where,
            float32=float32,
            progress=report,
        )
        if protocol:
            first = list(range(min(DEFAULT_TARGETS, len(train.classes) - 1)))
            crafted = craft_unseen(loaded, plugin, setup, precisions=wanted, targets=aims or first)
        else:
            crafted = craft(loaded, plugin, setup, name=attack, precisions=wanted, targets=aims)
    _print(crafted, train.classes)
    kept = sum(patch.kept for patch in crafted)
    chosen = [] if output == default else ["--patches", output]
    made = len(crafted) - kept
    written = f"wrote {made} patch{'es' if made > 1 else ''} to {output}" if made else "nothing to do"
    say(written + (f", {kept} were there already" if kept else ""))
    say(f"next: {command_of('evaluate', model_dir, *chosen)}")


def _make_attack(name: str, overrides: tuple[str, ...]) -> Any:
    if any(text.startswith("target=") for text in overrides):
        raise UsageError("target is not a key of this command: give the target classes with --target")

    from qadtr_brevitas.attacks.base import PatchAttack
    from qadtr_brevitas.config.plugins import make_plugin

    plugin = make_plugin(ATTACKS, name, overrides)
    if not isinstance(plugin, PatchAttack):
        able = [other for other, cls in ATTACKS.load_all().items() if issubclass(cls, PatchAttack)]
        raise UsageError(
            f"{name} attacks each image separately and makes no universal patch: use "
            f"`qadtr-brevitas evaluate MODEL_DIR --attack {name}`, or choose --attack from {', '.join(able)}"
        )
    return plugin


def _read_targets(text: str | None, classes: Sequence[str]) -> list[int | None] | None:
    if text is None:
        return None
    if text == "all":
        return list(range(len(classes)))
    return [_read_target(word.strip(), classes) for word in text.split(",")]


def _read_target(word: str, classes: Sequence[str]) -> int | None:
    if word == "none":
        return None
    if word in classes:
        return list(classes).index(word)
    if word.isdecimal() and int(word) < len(classes):
        return int(word)
    rule = f"0 to {len(classes) - 1}, all or none" if word.isdecimal() else suggest(word, [*classes, "all", "none"])
    raise UsageError(f"unknown target class {word!r}: {rule}")


def _print(crafted: Sequence[CraftedPatch], classes: Sequence[str]) -> None:
    data = [
        {
            "file": str(patch.path),
            "kind": patch.kind,
            "precision": str(patch.source),
            "target": patch.target,
            "held_out_asr": patch.held_out.value,
            "n": patch.held_out.n,
            "kept": patch.kept,
        }
        for patch in crafted
    ]
    emit(data, _table(crafted, classes).rich())


def _table(crafted: Sequence[CraftedPatch], classes: Sequence[str]) -> Table:
    from qadtr_brevitas.evaluation.report.layout import EMPTY, bits

    sources = list(dict.fromkeys(patch.source for patch in crafted))
    cells = {(patch.kind, patch.target, patch.source): patch.held_out for patch in crafted}
    rows: list[tuple[str, ...]] = []
    for kind, target in dict.fromkeys((patch.kind, patch.target) for patch in crafted):
        shares = [cells.get((kind, target, source)) for source in sources]
        words = [
            f"{100 * share.value:.1f} (n={share.n})" if share and share.value is not None else EMPTY for share in shares
        ]
        rows.append((kind, "any wrong class" if target is None else classes[target], *words))
    return Table(
        "ASR on n held-out images, in percent",
        ("patch", "target", *(bits(str(source)) for source in sources)),
        tuple(rows),
        ("These images chose the patches: the figures to report are those of `qadtr-brevitas evaluate`.",),
    )
