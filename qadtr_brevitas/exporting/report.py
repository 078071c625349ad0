"""What an export tells: the report that lies in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qadtr_brevitas.exporting.batch import Batch
from qadtr_brevitas.exporting.defense import Defense
from qadtr_brevitas.exporting.estimate import Emulation, Estimate
from qadtr_brevitas.exporting.integers import IntegerLayers
from qadtr_brevitas.exporting.ties import Ties
from qadtr_brevitas.exporting.verify import Agreement


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was exported, and how it was checked.

    Args:
        model: name and path of the model directory.
        fingerprint: of its weights.
        precision: the precision exported.
        format: name of the format.
        batch: how many images the file takes at once, or "dynamic".
        bytes: size of the model file.
        weight_bytes: of the weights and statistics at their bit-widths, as a chip or compiler stores them.
        baseline: accuracy of the float file beside it, on the images compared; None without one.
        agreement: how the file and the network agree; None if it was not verified.
        ties: what rounding ties up changes, as FINN does; None for other formats, or if it was not verified.
        emulation: what the compiler itself computed; None for other formats, or if it was not tried.
        unchecked: that the compiler itself did not check the file, and why; nothing where it did or there is none.
        estimate: what it costs on an FPGA; None if that was not asked for.
        defense: the masks that go with it, and what answers through them cost; None without.
        integers: which layers are computed in integers; None for formats that do not tell.
        seed: of the patches' places.
        command: command line.
        created: date and time.
        versions: of the packages that had a part in it.
        files: names of the other files in the folder, which another export may replace.
    """

    model: str
    fingerprint: str
    precision: str
    format: str
    batch: Batch
    bytes: int
    weight_bytes: int
    baseline: float | None
    agreement: Agreement | None
    ties: Ties | None
    emulation: Emulation | None
    unchecked: str
    estimate: Estimate | None
    defense: Defense | None
    integers: IntegerLayers | None
    seed: int
    command: str
    created: str
    versions: Mapping[str, str]
    files: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
