"""The contract of analyses: what an analysis receives, declares and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import torch

from qadtr_brevitas.config.slots import Slot
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import Field
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.core.registry import ATTACKS
from qadtr_brevitas.core.table import Table
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.quant import allowed_precisions
from qadtr_brevitas.reproduce.analyses.document import Picture, Record

if TYPE_CHECKING:
    from qadtr_brevitas.attacks.base import PatchAttack

    PatchAttackSlot: TypeAlias = PatchAttack
else:
    PatchAttackSlot = Annotated[
        Any,
        Slot(
            ATTACKS,
            contract="qadtr_brevitas.attacks.base:PatchAttack",
            advice="it makes no patch: choose an attack that does, for instance attack=lavan",
        ),
    ]

PatchFiles: TypeAlias = Annotated[
    tuple[str, ...], Field(description="finished patches, files or folders; none: make them with attack")
]
CraftingAttack: TypeAlias = Annotated[
    PatchAttackSlot, Field(description="patch attack, used where no patches are given")
]
ClassIndex: TypeAlias = Annotated[int, Field(ge=0)]
TargetClasses: TypeAlias = Annotated[
    tuple[ClassIndex, ...] | None, Field(description="classes that patches are made for; null: the first three")
]


@dataclass(frozen=True)
class AnalysisData:
    """The images of an analysis.

    Args:
        name: name of the data set, for the report.
        test: the test images that are measured.
        settings: settings of the data set, for the report.
        load_train: loads the training images, which patches are made on; None if no patch has to be made.
    """

    name: str
    test: Split
    settings: Mapping[str, Any] = field(default_factory=dict)
    load_train: Callable[[], Split] | None = None

    def train(self) -> Split:
        """Return the training images.

        Raises:
            UsageError: there are none to make patches on.
        """
        if self.load_train is None:
            raise UsageError("there are no training images to make patches on: give finished patches with patches=")
        return self.load_train()


@dataclass(frozen=True)
class AnalysisContext:
    """What an analysis runs on and with.

    Args:
        models: the models, on the device and in evaluation mode.
        data: the images.
        output: folder of the analysis, for cells, patches and pictures.
        seed: seed of placements, attacks and all other random draws.
        device: device of the models.
        batch_size: images in one forward pass.
        progress: called after each part of the work.
    """

    models: Sequence[LoadedModel]
    data: AnalysisData
    output: Path
    seed: int
    device: torch.device
    batch_size: int
    progress: Progress

    def precisions(self, loaded: LoadedModel) -> list[Precision]:
        """Return the precisions of a model, highest first; the first is the reference for the others."""
        return sorted(allowed_precisions(loaded.model), reverse=True)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The results of an analysis.

    Args:
        title: what was measured.
        records: every number.
        tables: the numbers to read first.
        pictures: PNG files in the output folder.
    """

    title: str
    records: Sequence[Record]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


class Analysis(ABC):
    """An analysis plug-in: measures something on models."""

    patches: tuple[str, ...] = ()
    """Files and folders of finished patches that the analysis reads. A plug-in that reads patches has a key `patches`;
    the contents of the files are part of what identifies its result."""

    @abstractmethod
    def run(self, context: AnalysisContext) -> Findings:
        """Measure the models of the context, and draw pictures into its output folder."""
