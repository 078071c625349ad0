"""The only judge of success: attacks x models x precisions, on the same images at the same places.

Each finished cell is on disk, so that a killed evaluation goes on where it stopped. Every geometry also gets a patch of
noise as control: what a patch does by merely covering pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluate.cells import CellStore
from qadtr_brevitas.evaluate.image_attacks import NamedAttack
from qadtr_brevitas.evaluate.jobs import Bench, Progress, compute
from qadtr_brevitas.evaluate.judge import data_facts, make_report
from qadtr_brevitas.evaluate.plan import Grid, Transfer
from qadtr_brevitas.precision import PrecisionLike, parse_precisions
from qadtr_brevitas.report import Report
from qadtr_brevitas.sources import Access
from qadtr_brevitas.subjects import Contender, Subject

__all__ = ["Transfer", "evaluate"]


def evaluate(
    subjects: Sequence[Subject],
    patches: Sequence[Contender],
    split: Split,
    *,
    output: Path,
    data_name: str,
    attacks: Sequence[NamedAttack] = (),
    surrogates: Sequence[Subject] = (),
    eot: Sequence[Access] = (),
    precisions: Sequence[PrecisionLike] | None = None,
    transfer: Transfer = "all",
    cells: Sequence[Path] = (),
    data_settings: dict[str, Any] | None = None,
    available: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    command: str = "",
    progress: Progress | None = None,
) -> Report:
    """Scores every patch, a control of noise for each geometry, and every attack, on every model and precision.

    Args:
        subjects: the models; they are moved to the device and put in eval mode.
        patches: the patches; with none and no attacks, the report has clean accuracies only.
        split: the images and labels.
        output: folder that keeps the finished cells, in `cells/`.
        data_name: name of the data set, for the report.
        attacks: attacks on each image by itself, made on every model at every precision.
        surrogates: models that attacks are made on as well, but that are not scored.
        eot: means over precisions that attacks are made on as well.
        precisions: precisions to score; None for all that a model allows.
        transfer: what to move to other models and precisions; white-box, EOT and control cells are always scored.
        cells: more output folders, or folders of cells, whose finished cells are used.
        data_settings: settings of the data set, for the report.
        available: how many images the whole test split has; None if `split` is all of it.
        seed: seed of the placements, the controls and the attacks.
        batch_size: images in one forward pass. Attacks take the images in chunks of this size, each with a random
            stream of its own: another size gives other attacks.
        device: where the models run.
        command: command line, for the report.
        progress: told after each cell.

    Raises:
        UsageError: a precision that a model does not allow, a patch that does not fit the images, a target that is no
            class, two models, patches or attacks of one name, surrogates from which nothing may be transferred, no
            cells in one of `cells`, or an attack that gives something else than images.
        DataError: a model is for other images or another number of classes.
        CheckpointError: a cell cannot be written.
    """
    data = data_facts(split, name=data_name, settings=data_settings, available=available)
    grid = Grid(
        subjects=tuple(subjects),
        patches=tuple(patches),
        bench=Bench(split, data.fingerprint, seed, batch_size),
        data_name=data_name,
        attacks=tuple(attacks),
        surrogates=tuple(surrogates),
        eot=tuple(eot),
        precisions=None if precisions is None else parse_precisions(precisions),
        transfer=transfer,
    )
    store = CellStore.open(output, cells)
    compute(grid.jobs(), store, device=device, progress=progress)
    return make_report(grid, store, data=data, device=str(device), command=command)
