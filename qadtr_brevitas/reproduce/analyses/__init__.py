"""Looks into why attacks move between precisions: gradients, features, places, sizes, and accuracy against eps.

Each analysis is a plug-in; `run_analysis` gives it what it needs and keeps what it found.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from qadtr_brevitas.core.progress import Progress, silent
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.reproduce.analyses.base import Analysis as Analysis
from qadtr_brevitas.reproduce.analyses.base import AnalysisData as AnalysisData
from qadtr_brevitas.reproduce.analyses.base import Findings as Findings
from qadtr_brevitas.reproduce.analyses.base import Picture as Picture
from qadtr_brevitas.reproduce.analyses.base import Record as Record
from qadtr_brevitas.reproduce.analyses.run import run


def run_analysis(
    analysis: Analysis,
    models: Sequence[LoadedModel],
    data: AnalysisData,
    output: Path,
    *,
    seed: int,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    command: str = "",
) -> Path:
    """Measures, and writes analysis.json, records.csv and pictures.

    An analysis that is there already is left as it is: of the same models, images, finished patches or training images
    to make them on, settings, seed and release.

    Args:
        analysis: what to measure.
        models: on what; moved to the device and put in eval mode.
        data: the images.
        output: folder of its own.
        seed: of placements, attacks and whatever else is drawn.
        progress: told how far it is.
        device: where to compute.
        batch_size: images in one forward pass.
        command: command line, for the report.

    Returns:
        The path of analysis.json.

    Raises:
        UsageError: no models, a setting that does not fit the models or the images.
        DataError: a model is for other images or another number of classes.
        CheckpointError: a file cannot be written.
    """
    return run(
        analysis,
        models,
        data,
        output,
        seed=seed,
        progress=progress or silent,
        device=device,
        batch_size=batch_size,
        command=command,
    )
