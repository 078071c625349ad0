"""What an analysis gets and gives back. Light to import: analyses are named on the command line and in studies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.report.layout import Table
from qadtr_brevitas.quant import allowed_precisions

"""Is told finished parts, all parts, and what the last one was."""


@dataclass(frozen=True)
class AnalysisData:
    """The images of an analysis.

    Args:
        name: name of the data set, for the report.
        test: what is measured on.
        settings: settings of the data set, for the report.
        load_train: gives the training images, which patches are made on; None where no patch has to be made.
    """

    name: str
    test: Split
    settings: Mapping[str, Any] = field(default_factory=dict)
    load_train: Callable[[], Split] | None = None

    def train(self) -> Split:
        """The training images.

        Raises:
            UsageError: there are none to make patches on.
        """
        if self.load_train is None:
            raise UsageError(
                "there are no training images to make patches on: give the analysis finished ones, patches="
            )
        return self.load_train()


@dataclass(frozen=True)
class AnalysisContext:
    """What every analysis gets.

    Args:
        loaded_models: the models, on the device and in eval mode.
        data: the images.
        output: folder of its own, for cells, patches and pictures.
        seed: of placements, attacks and whatever else is drawn.
        device: where to compute.
        batch_size: images in one forward pass.
        progress: told how far it is.
    """

    loaded_models: Sequence[LoadedModel]
    data: AnalysisData
    output: Path
    seed: int
    device: torch.device
    batch_size: int
    progress: Progress

    def precisions(self, loaded: LoadedModel) -> list[Precision]:
        """The precisions of a model, from many bits to few; the first one is what the others are compared with."""
        return sorted(allowed_precisions(loaded.model), reverse=True)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One number.

    Args:
        model: name of the model.
        precision: the precision it was measured at.
        what: what it is: `asr`, `accuracy`, `cosine`, `mse`...
        value: the number, shares in [0, 1]; None where there was nothing to measure.
        low: lower end of the 95 % interval, where there is one.
        high: its upper end.
        n: how many images it is of.
        facets: what else tells it from the others, for instance the attack.
    """

    model: str
    precision: str
    what: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    facets: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A PNG in the output folder.

    Args:
        file: its name.
        caption: what it shows, and of what.
    """

    file: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an analysis found.

    Args:
        title: what was looked at.
        records: every number.
        tables: the numbers to read first.
        pictures: PNG files in the output folder.
    """

    title: str
    records: Sequence[Record]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


class Analysis(ABC):
    """A plug-in that measures something on models."""

    @abstractmethod
    def run(self, context: AnalysisContext) -> Findings:
        """Measures, and draws pictures into the output folder."""
