"""The patches an analysis looks at: finished ones, or some made at the highest precision of each model.

Patches and attacks scored by the evaluation, cell by cell, and the means over them as records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import PatchAttack
from qadtr_brevitas.config.slots import slot_name
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.files import fingerprint_facts, fingerprint_file, fingerprint_tensors
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation import Grid, evaluate
from qadtr_brevitas.evaluation.craft import CraftSetup, craft
from qadtr_brevitas.evaluation.entries import PATCH_FOLDER, LoadedModel, NamedPatch, load_patches, unique_names
from qadtr_brevitas.evaluation.metrics import mean
from qadtr_brevitas.evaluation.predict import placements
from qadtr_brevitas.evaluation.report import AttackCell, EvaluationReport, ImageAttackFacts, PatchFacts, Rate
from qadtr_brevitas.reproduce.analyses.base import AnalysisContext, Record

_MOST_TRAIN, _MOST_HELD_OUT = 10_000, 1_000
_KEY_LENGTH = 12
# Files are named after them.
_IN_THE_NAME = ("size", "target")


def finished_patches(analysis: Any) -> list[str]:
    """What tells apart the finished patches that an analysis takes: their files may be remade under the same names.

    Args:
        analysis: the analysis; only some have a field `patches`.

    Raises:
        UsageError: a place without patches.
        CheckpointError: a file that is no patch.
    """
    places = [Path(place) for place in getattr(analysis, "patches", ()) if isinstance(place, str)]
    return [fingerprint_file(Path(found.file)) for found in load_patches(places) if found.file]


def float_patches(
    context: AnalysisContext,
    loaded: LoadedModel,
    attacks: Sequence[Any],
    *,
    finished: Sequence[str],
    targets: Sequence[int] | None,
) -> list[NamedPatch]:
    """Patches made at the highest precision of a model, 32 bit where it has it.

    Args:
        context: of the analysis; patches are made in its output folder, and kept.
        loaded: the model.
        attacks: patch attacks, each made on the model's training images unless there are finished patches.
        finished: patch files and folders to take patches from instead, whatever model they were made on.
        targets: classes to aim at; None for the first three.

    Raises:
        UsageError: an attack that makes no patch, finished patches none of which was made at that precision, or no
            training images to make any on.
    """
    reference = str(context.precisions(loaded)[0])
    if finished:
        found = load_patches([Path(place) for place in finished])
        wanted = [c for c in found if c.facts.source is None or c.facts.source.precision == reference]
        if not wanted:
            raise UsageError(
                f"none of the patches in {', '.join(finished)} was made at {reference} bit, which the other precisions "
                f"are compared with: make some with `qadtr-brevitas attack MODEL_DIR --precision {reference}`"
            )
        return wanted
    folder = context.output / PATCH_FOLDER / loaded.name.replace("/", "-")
    paths = [path for attack in attacks for path in _make(context, loaded, attack, folder, reference, targets)]
    # Named after their model too, because several models have patches of one name.
    return [
        NamedPatch(f"{loaded.name} {name}", patch_entry.patch, patch_entry.file)
        for name, patch_entry in zip(unique_names(paths), load_patches(paths), strict=True)
    ]


def put_on(patches: Sequence[NamedPatch], images: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Patched images (N, 3, H, W) and the pixels that are covered, boolean (N, 1, H, W).

    Several patches take turns, so that every image counts once.

    Args:
        patches: at least one.
        images: (N, 3, H, W) in [0, 1].
        seed: of the placements.
    """
    patched, covered = images.clone(), torch.zeros_like(images[:, :1], dtype=torch.bool)
    for turn, patch_entry in enumerate(patches):
        mine = torch.arange(turn, len(images), len(patches))
        size = images.shape[-2], images.shape[-1]
        corners = placements(patch_entry.patch, len(images), size, seed=seed)[mine].to(images.device)
        patch = patch_entry.patch.to(images.device)
        stamp = replace(patch, texture=torch.ones_like(patch.texture))
        patched[mine] = patch.apply(images[mine], corners=corners)
        covered[mine] = stamp.apply(torch.zeros_like(images[mine]), corners=corners)[:, :1] > 0
    return patched, covered


def _make(
    context: AnalysisContext,
    loaded: LoadedModel,
    attack: Any,
    folder: Path,
    precision: str,
    targets: Sequence[int] | None,
) -> list[Path]:
    name = slot_name(attack)
    if not isinstance(attack, PatchAttack):
        raise UsageError(f"{name} makes no patch: choose an attack that does, for instance attack=lavan")
    held_out, train = _divide(context.data.train(), seed=context.seed)
    setup = CraftSetup(
        train=train,
        held_out=held_out,
        output=folder / f"{name}-{_key(context, loaded, attack, held_out, train)}",
        data={"name": context.data.name, "settings": dict(context.data.settings)},
        seed=context.seed,
        batch_size=context.batch_size,
        device=context.device,
        progress=context.progress,
    )
    made = craft(loaded, attack, setup, name=name, precisions=[precision], targets=targets)
    return [patch.path for patch in made]


def _key(context: AnalysisContext, loaded: LoadedModel, attack: Any, *splits: Split) -> str:
    """Of what files are not named after: patches of other settings stay, for whoever goes back to these."""
    settings = {name: value for name, value in asdict(attack).items() if name not in _IN_THE_NAME}
    images = fingerprint_tensors([tensor for split in splits for tensor in (split.images, split.labels)])
    return fingerprint_facts([loaded.fingerprint, settings, images, context.seed])[:_KEY_LENGTH]


def _divide(split: Split, *, seed: int) -> tuple[Split, Split]:
    """Images to choose patches on and to make them on, as many as `attack` takes."""
    judge, rest = split.divide(min(_MOST_HELD_OUT, max(1, len(split) // 5)), seed=seed)
    return judge, rest.balanced(min(_MOST_TRAIN, len(rest)), seed=seed)


Facets: TypeAlias = "Mapping[str, Any] | None"
"""What a cell's figure is told apart by; None for a cell that does not count."""


def score(context: AnalysisContext, loaded: LoadedModel, **grid: Any) -> EvaluationReport:
    """The evaluation of one model; its finished cells are kept in the output folder.

    Args:
        context: of the analysis.
        loaded: the model.
        grid: further arguments of `Grid`.
    """
    plan = Grid(
        loaded_models=[loaded],
        split=context.data.test,
        data_name=context.data.name,
        data_settings=context.data.settings,
        available=context.data.test.available,
        seed=context.seed,
        batch_size=context.batch_size,
        **grid,
    )
    return evaluate(plan, output=context.output, device=context.device, progress=context.progress)


def records(
    report: EvaluationReport,
    what: str,
    figure: Callable[[AttackCell], Rate],
    facets: Callable[[AttackCell, PatchFacts | ImageAttackFacts], Facets],
) -> list[Record]:
    """Means of a figure over the cells that share model, precision and facets, for instance over targets.

    Args:
        report: the evaluation.
        what: how the figure is called.
        figure: the figure of a cell.
        facets: what tells cells apart.
    """
    by_name = report.attack_facts()
    groups: dict[tuple[Any, ...], list[AttackCell]] = {}
    told: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for cell in report.cells:
        found = facets(cell, by_name[cell.attack])
        if found is not None:
            key = (cell.model, cell.precision, *found.items())
            groups.setdefault(key, []).append(cell)
            told[key] = found
    return [_record(what, figure, cells, told[key]) for key, cells in groups.items()]


def _record(
    what: str, figure: Callable[[AttackCell], Rate], cells: Sequence[AttackCell], facets: Mapping[str, Any]
) -> Record:
    first, average = cells[0], mean([figure(cell).share for cell in cells])
    low, high = average.interval if average else (None, None)
    return Record(
        model=first.model,
        precision=first.precision,
        what=what,
        value=average.value if average else None,
        low=low,
        high=high,
        n=average.n[0] if average else 0,
        facets=facets,
    )


def clean_records(report: EvaluationReport, **facets: Any) -> list[Record]:
    """Accuracy without an attack."""
    return [
        Record(
            model=cell.model,
            precision=cell.precision,
            what="accuracy",
            value=cell.accuracy.value,
            low=cell.accuracy.low,
            high=cell.accuracy.high,
            n=cell.accuracy.n,
            facets=facets,
        )
        for cell in report.clean
    ]
