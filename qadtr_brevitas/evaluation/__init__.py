"""The only judge of success: attacks x models x precisions, on the same images at the same places.

Each finished cell is on disk, so that a killed evaluation goes on where it stopped. Every geometry also gets a patch of
noise as control: what a patch does by merely covering pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.evaluation.cells import CellStore
from qadtr_brevitas.evaluation.grid import Grid, Transfer
from qadtr_brevitas.evaluation.image_attacks import NamedAttack
from qadtr_brevitas.evaluation.jobs import compute
from qadtr_brevitas.evaluation.report import EvaluationReport
from qadtr_brevitas.evaluation.scoring import make_report

__all__ = ["CellStore", "Grid", "NamedAttack", "Transfer", "compute", "evaluate", "make_report"]


def evaluate(
    grid: Grid,
    *,
    output: Path | None = None,
    cells: Sequence[Path] = (),
    device: torch.device | str = "cpu",
    command: str = "",
    progress: Progress | None = None,
) -> EvaluationReport:
    """Compute the cells of a grid that are missing, and score all of them.

    Args:
        grid: what meets what; its models are moved to the device and put in eval mode.
        output: folder that keeps the finished cells, in `cells/`; None to keep nothing.
        cells: more output folders, or folders of cells, whose finished cells are used.
        device: where the models run.
        command: command line, for the report.
        progress: called after each cell.

    Raises:
        UsageError: no cells in one of `cells`, or an attack that gives something else than images.
        CheckpointError: a cell cannot be written.
    """
    if output is None:
        with TemporaryDirectory(prefix="qadtr_brevitas-") as folder:
            return evaluate(grid, output=Path(folder), cells=cells, device=device, command=command, progress=progress)
    store = CellStore.open(output, cells)
    compute(grid.jobs(), store, device=device, progress=progress)
    return make_report(grid, store, device=str(device), command=command)
