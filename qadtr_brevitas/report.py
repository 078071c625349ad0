"""The report of an evaluation: one typed document, `report.json`, from which every table and picture is made."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qadtr_brevitas import __version__
from qadtr_brevitas.errors import CheckpointError
from qadtr_brevitas.metrics import Score, Share

SCHEMA_VERSION = 1
REPORT_FILE = "report.json"

Threat = Literal["white-box", "transfer", "control"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rate(_Part):
    """A share of images, its denominator and its 95 % Wilson interval; `value` is null where `n` is 0."""

    count: int
    n: int
    value: float | None
    low: float
    high: float

    @classmethod
    def of(cls, share: Share) -> Rate:
        """The rate that a counted share stands for."""
        low, high = share.interval
        return cls(count=share.count, n=share.n, value=share.value, low=low, high=high)

    @property
    def share(self) -> Share:
        """The counts alone."""
        return Share(self.count, self.n)


class DataFacts(_Part):
    """The images the figures are of."""

    name: str
    settings: dict[str, Any] = {}
    split: str = "test"
    images: int
    available: int
    image_size: tuple[int, int]
    classes: tuple[str, ...]
    fingerprint: str


class ModelFacts(_Part):
    """One evaluated model; `name` is unique in the report, `fingerprint` says which weights it was."""

    name: str
    path: str
    fingerprint: str
    architecture: str
    settings: dict[str, Any] = {}
    source: str = ""
    precisions: tuple[str, ...]


class SourceFacts(_Part):
    """The model and precision a patch was made at."""

    name: str
    fingerprint: str
    precision: str


class PatchFacts(_Part):
    """One patch; `name` is unique in the report, and `geometry` the same for patches of one size, shape and place.

    `source` is null where it is not known or does not apply.
    """

    name: str
    file: str | None
    fingerprint: str
    attack: str
    settings: dict[str, Any] = {}
    target: int | None
    height: int
    width: int
    pixels: int
    place: Literal["random"] | tuple[int, int]
    geometry: str
    source: SourceFacts | None
    control: bool = False

    @property
    def family(self) -> str:
        """What patches that may be averaged over have in common: attack, size, place and aim."""
        size = f"{self.height}x{self.width}"
        shape = "" if self.pixels == self.height * self.width else f" of {self.pixels} pixels"
        place = "" if self.place == "random" else f" at {self.place[0]},{self.place[1]}"
        return f"{self.attack} {size}{shape}{place}{' untargeted' if self.target is None else ''}"


class CleanCell(_Part):
    """Accuracy of one model at one precision without a patch."""

    model: str
    precision: str
    accuracy: Rate


class AttackCell(_Part):
    """One patch on one model at one precision, scored for one target (null: any wrong class)."""

    model: str
    precision: str
    patch: str
    target: int | None
    threat: Threat
    asr: Rate
    asr_all: Rate
    untargeted: Rate
    clean_accuracy: Rate
    robust_accuracy: Rate

    @classmethod
    def of(
        cls, score: Score, *, model: str, precision: str, patch: str, target: int | None, threat: Threat
    ) -> AttackCell:
        """The cell of a score."""
        rates = {name: Rate.of(getattr(score, name)) for name in Score.__dataclass_fields__}
        return cls(model=model, precision=precision, patch=patch, target=target, threat=threat, **rates)


class Report(_Part):
    """Everything one evaluation found, and everything needed to redo it."""

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    created: str
    command: str
    versions: dict[str, str]
    seed: int
    device: str
    data: DataFacts
    models: tuple[ModelFacts, ...]
    patches: tuple[PatchFacts, ...]
    clean: tuple[CleanCell, ...]
    cells: tuple[AttackCell, ...]

    def patch(self, name: str) -> PatchFacts:
        """The patch of that name."""
        return next(patch for patch in self.patches if patch.name == name)


def read_report(path: Path) -> Report:
    """Reads `report.json`, given the file or the folder that holds it.

    Raises:
        CheckpointError: no such file, or not a report this version can read.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    try:
        return Report.model_validate_json(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"no report at {file}: make one with `qadtr-brevitas evaluate`") from error
    except ValidationError as error:
        raise CheckpointError(
            f"{file} is not a report of schema version {SCHEMA_VERSION}: make it anew with `qadtr-brevitas evaluate`"
        ) from error


def versions() -> dict[str, str]:
    """Versions of Python, this package and the packages that figures depend on."""
    found = {"python": platform.python_version(), "qadtr-brevitas": __version__}
    for package in ("torch", "brevitas", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
