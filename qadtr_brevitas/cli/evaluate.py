"""`qadtr-brevitas evaluate MODEL_DIR...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qadtr_brevitas.cli.certify_options import certification_of, certify_options
from qadtr_brevitas.cli.common import (
    RecordedCommand,
    be_quiet,
    command_line,
    command_of,
    compile_option,
    emit,
    examples,
    load_split,
    progress,
    say,
    work_options,
)
from qadtr_brevitas.cli.evaluate_options import (
    EvaluateOptions,
    all_option,
    audit_options,
    check_options,
    move_options,
    plan_options,
    run_audits,
    work_division,
)
from qadtr_brevitas.cli.start import check_data, check_models, load_libraries
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.extras import require
from qadtr_brevitas.core.registry import ATTACKS
from qadtr_brevitas.pipeline.directories import EVALUATION_FOLDER, patch_files, patch_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from rich.console import RenderableType

    from qadtr_brevitas.auditing import AuditReport
    from qadtr_brevitas.auditing.headline import Headline
    from qadtr_brevitas.core.patch_size import PatchSize
    from qadtr_brevitas.evaluation import CellStore, Grid, NamedAttack
    from qadtr_brevitas.evaluation.certification import Certification
    from qadtr_brevitas.evaluation.entries import NamedPatch
    from qadtr_brevitas.evaluation.report import EvaluationReport
    from qadtr_brevitas.evaluation.sharding import Shard
    from qadtr_brevitas.quant.inference import InferenceMode

_MANY_PASSES = 200_000
"""Forward passes that are worth a compilation."""


@click.command(
    "evaluate",
    cls=RecordedCommand,
    epilog=examples(
        "qadtr-brevitas evaluate runs/qadtr",
        "qadtr-brevitas evaluate runs/qat runs/qadtr -o runs/report",
        "qadtr-brevitas evaluate models/resnet18 --clean",
        "qadtr-brevitas evaluate runs/qadtr --patches runs/qat/patches --precision 8,4 --images 1000",
        "qadtr-brevitas evaluate runs/qadtr --attack pgd --attack '{name: pgd, eps: 0.03, steps: 20}' --eot 8+4+2",
        "qadtr-brevitas evaluate runs/qadtr --audit --twin runs/qat",
        "qadtr-brevitas evaluate runs/qadtr --clean --certify 8 --images 500",
        "qadtr-brevitas evaluate runs/qadtr --patches sticker.png --patch-size 6,8 --rotate 15",
        "qadtr-brevitas evaluate runs/qadtr --at 2,2 --shift 6,12,18 --rotate 15,45",
        "torchrun --standalone --nproc-per-node 2 -m qadtr_brevitas evaluate runs/qat runs/qadtr",
    ),
)
@click.argument("model_dirs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL_DIR...")
@plan_options
@move_options
@click.option("--images", type=click.IntRange(min=1), help="Use only so many test images, balanced over classes.")
@click.option("--batch-size", "-b", type=click.IntRange(min=1), default=256, show_default=True, help="Images at once.")
@audit_options
@certify_options
@work_division
@compile_option
@all_option
@work_options(data="the one the models were trained on", output="MODEL_DIR/evaluation")
def command(**options: Any) -> None:
    """Score models under attack at every precision and write a report.

    Every patch meets every model on the same test images at the same places, beside a patch of noise of its size.
    Every --attack is made on each model at each precision, and what it makes meets every model as well.
    --audit runs checks that tell a robust network from an attack that failed.
    Finished parts are kept in the output folder: repeat the command to resume an interrupted one.
    """
    given = EvaluateOptions(**options)
    output = given.output or given.model_dirs[0] / EVALUATION_FOLDER
    # Checked before anything heavy is imported.
    check_options(given)
    twin = [given.twin] if given.twin else []
    check_models([*given.model_dirs, *given.surrogates, *twin, *given.ablations])
    check_data(given.data)
    require("matplotlib", extra="report", purpose="evaluate")
    load_libraries()

    from qadtr_brevitas.config.plugins import parse_plugin
    from qadtr_brevitas.core.device import resolve_device
    from qadtr_brevitas.evaluation import CellStore, compute
    from qadtr_brevitas.evaluation.sharding import Shard, local_device, process_share, together
    from qadtr_brevitas.pipeline.datasets import find_dataset
    from qadtr_brevitas.quant.inference import parse_modes

    plugins = [parse_plugin(ATTACKS, text, option="--attack") for text in given.attacks]
    wanted = parse_modes(given.precisions) if given.precisions else None
    dataset = find_dataset(given.model_dirs, given.data, report=say)
    processes = process_share()
    shard = Shard.parse(given.shard) if given.shard else None
    if shard and processes.of > 1:
        raise UsageError("torchrun already divides the work: remove --shard")
    if processes.number > 1:
        be_quiet()
    where = resolve_device(local_device(given.device))
    with together(processes):
        grid, patches = _plan(given, plugins, wanted, dataset, device=where)
        store = CellStore.open(output, given.cells)
        with progress("evaluating") as report_progress:
            mine = (shard or processes).pick(grid.jobs())
            compute(mine, store, device=where, progress=report_progress)
    if shard:
        _tell_missing(shard, len(mine), grid, store)
    elif processes.number == 1:
        # Finds everything, unless the other processes wrote to a folder that this one does not see.
        compute(grid.jobs() if processes.of > 1 else [], store, device=where)
        _report(grid, store, patches, given, output=output, device=where)


def _plan(
    given: EvaluateOptions,
    plugins: Sequence[Any],
    wanted: Sequence[InferenceMode] | None,
    dataset: Any,
    *,
    device: torch.device,
) -> tuple[Grid, list[NamedPatch]]:
    """Return what to evaluate, and the patches as they were made."""
    from qadtr_brevitas.config.slots import slot_name
    from qadtr_brevitas.core.plugin import plugin_settings
    from qadtr_brevitas.evaluation import Grid, NamedAttack
    from qadtr_brevitas.evaluation.defended import defended
    from qadtr_brevitas.evaluation.ensemble import missing_ensembles
    from qadtr_brevitas.evaluation.entries import load_models, load_patches
    from qadtr_brevitas.evaluation.grid import read_means
    from qadtr_brevitas.evaluation.variants import PatchVariants

    attacks = [NamedAttack.of(plugin) for plugin in plugins]
    added = [] if given.ensemble == "no" else missing_ensembles(attacks, given.ensemble)
    attacks += added
    means = read_means(given.eot, attacks)
    compiling = say if given.compiles else None
    models = load_models([*given.model_dirs, *given.surrogates], device=device, compiling=compiling)
    patches = load_patches(_patch_places(given), sizes=given.patch_sizes or ())
    split = load_split(dataset, "test", limit=given.images, seed=given.seed)
    if given.images is not None:
        # Refuses more images than there are.
        split = split.balanced(given.images, seed=given.seed)
    scored = models[: len(given.model_dirs)]
    behind = [(model, against) for model in scored for against in _against(given, given.defend)]
    moves = PatchVariants(at=given.at, shifts=given.shifts or (), degrees=given.degrees or ())
    grid = Grid(
        loaded_models=[*scored, *(defended(model, against, batch_size=given.batch_size) for model, against in behind)],
        patches=[*patches, *moves.variants(patches, split.image_size)],
        split=split,
        data_name=slot_name(dataset),
        data_settings=plugin_settings(dataset),
        available=split.available,
        attacks=attacks,
        surrogates=models[len(given.model_dirs) :],
        eot=means,
        precisions=wanted,
        transfer=given.transfer,
        certifications=_against(given, given.certify),
        certify_images=given.certify_images,
        seed=given.seed,
        batch_size=given.batch_size,
    )
    _tell_certification_cost(grid, compiles=given.compiles)
    _tell_ensemble_cost(grid, added)
    _tell_left_out(patches, grid, alone=not (attacks or given.certify or given.audit))
    return grid, patches


def _against(given: EvaluateOptions, sizes: Sequence[PatchSize] | None) -> list[Certification]:
    return [certification_of(given, size) for size in sizes or ()]


def _tell_certification_cost(grid: Grid, *, compiles: bool) -> None:
    for certification in grid.certifications:
        count, passes = grid.certified_count, certification.passes_to_prove(grid.split.image_size)
        say(f"certifying {count} images against {certification}, at each precision: {passes} passes for a proved image")
        if count * passes >= _MANY_PASSES and not compiles:
            say("--compile makes these passes faster, after a wait at the first one")


def _tell_ensemble_cost(grid: Grid, added: Sequence[NamedAttack]) -> None:
    for attack in added:
        assert attack.passes is not None
        sources = sum(sourced.attack is attack for sourced, _ in grid.sourced_attacks)
        say(
            f"adding {attack.family} for the worst case: at most {attack.passes[0]:,} forward and "
            f"{attack.passes[1]:,} backward passes of each image, {sources} times (models and precisions); "
            "--ensemble no leaves it out, --ensemble standard is stronger"
        )


def _tell_left_out(patches: Sequence[NamedPatch], grid: Grid, *, alone: bool) -> None:
    """Says how many of the patches found are not scored.

    Raises:
        UsageError: none is, and they are all there is to score (`alone`).
    """
    scored = {patch_entry.name for victim in grid.victims for patch_entry in grid.patches_on(victim)}
    left_out = [patch for patch in patches if patch.name not in scored]
    if not left_out:
        return
    sources = dict.fromkeys(patch.facts.source.precision for patch in left_out if patch.facts.source)
    made_at = ", ".join(sources) or "no precision that is known"
    remedy = f"--transfer {grid.transfer} excludes them: remove it, or score what they were made on"
    if alone and len(left_out) == len(patches):
        raise UsageError(f"none of the {len(patches)} patches was made on what is scored (but at {made_at}); {remedy}")
    say(f"{len(left_out)} of {len(patches)} patches were made elsewhere (at {made_at}); {remedy}")


def _patch_places(given: EvaluateOptions) -> Sequence[Path]:
    """Where patches are; where nothing is said and there are other attacks, those that are there."""
    if given.patches or given.clean:
        return given.patches
    own = list(map(patch_folder, given.model_dirs))
    surrogates = list(map(patch_folder, given.surrogates))
    needed = [] if given.attacks or given.audit or given.certify else own
    return [folder for folder in (*own, *surrogates) if folder in needed or patch_files(folder)]


def _tell_missing(shard: Shard, count: int, grid: Grid, store: CellStore) -> None:
    from qadtr_brevitas.evaluation.sharding import missing_by_share

    missing = missing_by_share(grid.jobs(), store, shard.of)
    emit({"shard": str(shard), "cells": count, "missing": {str(share): cells for share, cells in missing.items()}})
    say(f"shard {shard} is finished: {count} of {len(grid.jobs())} cells are in {store.folder}")
    if missing:
        words = ", ".join(f"{cells} of shard {share}" for share, cells in missing.items())
        say(f"missing here: {words}; next: the same command with --shard {next(iter(missing))}")
    else:
        say("nothing is missing; next: the same command without --shard, which writes the report")


def _report(
    grid: Grid,
    store: CellStore,
    patches: list[NamedPatch],
    given: EvaluateOptions,
    *,
    output: Path,
    device: torch.device,
) -> None:
    from qadtr_brevitas.auditing.headline import headline
    from qadtr_brevitas.auditing.tables import write_audits
    from qadtr_brevitas.evaluation import make_report
    from qadtr_brevitas.evaluation.report.files import write_report
    from qadtr_brevitas.evaluation.report.gallery import draw_pictures

    report = make_report(grid, store, device=str(device), command=command_line())
    pictures = draw_pictures(report, grid.loaded_models, patches, grid.split, folder=output, device=device)
    first = headline(report)
    written = write_report(report, output, pictures=pictures, summary=first.markdown() if first else "")
    document = report.model_dump(mode="json")
    audits = run_audits(grid, given, output=output, device=device) if given.audit else []
    if audits:
        first = headline(report, audits)
        write_report(report, output, pictures=pictures, summary=first.markdown() if first else "")
        written.append(write_audits(audits, output))
        document["audit"] = [audit.model_dump(mode="json") for audit in audits]
    emit(document, _terminal(report, audits, first, show_all=given.show_all))
    say(f"wrote {', '.join(path.name for path in [*written, *pictures])} to {output}")
    model = grid.loaded_models[0].path
    more = (
        command_of("evaluate", model, "OTHER_MODEL_DIR", "-o", "FOLDER")
        if len(grid.loaded_models) == 1
        else command_of("attack", model, "--target", "all")
    )
    tables = "" if given.show_all else "; every table: --all, or report.md"
    say(f"read {output / 'report.md'}; next: {more}{tables}")


def _terminal(
    report: EvaluationReport, audits: Sequence[AuditReport], first: Headline | None, *, show_all: bool
) -> RenderableType:
    from rich.console import Group

    from qadtr_brevitas.auditing.tables import audit_tables
    from qadtr_brevitas.evaluation.report.summaries import terminal_tables

    tables = [*terminal_tables(report), *(audit_tables(audits) if audits else [])] if show_all else []
    return Group(*([first.rich()] if first else []), *(table.rich() for table in tables))
