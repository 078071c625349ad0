"""What a report holds, and how it is read."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from qadtr_brevitas.config.renamed import with_present_names
from qadtr_brevitas.core.document import Document
from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.core.files import read_json
from qadtr_brevitas.core.version import __version__
from qadtr_brevitas.evaluation.metrics import Proportion, Score
from qadtr_brevitas.pipeline.directories import REPORT_FILE

SCHEMA_VERSION = 4
# Reports of version 2 have no certifications, those of version 3 less about each, and nothing else is different.
_READABLE = (2, 3, 4)

Threat = Literal["white-box", "eot", "transfer", "control"]
"""Made on the attacked model and precision, on a mean over precisions of that model, elsewhere, or not optimized."""

Scope = Literal["own", "all"]
"""Attacks made on the attacked model (threats white-box and eot), or these and all that were transferred."""


class Rate(Document):
    """A share of images, its denominator and its 95 % Wilson interval; `value` is null where `n` is 0."""

    count: int
    n: int
    value: float | None
    low: float
    high: float

    @classmethod
    def of(cls, share: Proportion) -> Rate:
        """Return the rate that a counted share stands for."""
        low, high = share.interval
        return cls(count=share.count, n=share.n, value=share.value, low=low, high=high)

    @property
    def share(self) -> Proportion:
        """The counts alone."""
        return Proportion(self.count, self.n)


class DataFacts(Document):
    """The images the figures are of."""

    name: str
    settings: dict[str, Any] = {}
    split: str = "test"
    images: int
    available: int
    image_size: tuple[int, int]
    classes: tuple[str, ...]
    fingerprint: str


class ModelFacts(Document):
    """One evaluated model; `name` is unique in the report, `fingerprint` says which weights it was."""

    name: str
    path: str
    fingerprint: str
    architecture: str
    settings: dict[str, Any] = {}
    source: str = ""
    precisions: tuple[str, ...]


class SourceFacts(Document):
    """The model that an attack was made on, and the precision, or the mean over precisions as `8+4+2`."""

    name: str
    fingerprint: str
    precision: str


class VariantFacts(Document):
    """How a patch was moved or turned before it was scored.

    `of` is the name of the patch as it was made, `at` the fixed place it was put at (null: its own), `shift` the pixels
    it was then moved down and to the right, `degrees` the angle it was turned by.
    """

    of: str
    at: tuple[int, int] | None = None
    shift: int = 0
    degrees: float = 0

    @property
    def label(self) -> str:
        """How tables call it."""
        words = [
            f"at {self.at[0]},{self.at[1]}" if self.at else "",
            f"shifted by {self.shift}" if self.shift else "",
            f"rotated by {self.degrees:g} deg" if self.degrees else "",
        ]
        return " ".join(filter(None, words)) or "as made"


AttackSettings = Annotated[dict[str, Any], AfterValidator(with_present_names)]
"""The keys of an attack, as JSON values. Reports and patches of older releases may have older names for them."""


class PatchFacts(Document):
    """One patch; `name` is unique in the report, and `geometry` the same for patches of one size, shape and place.

    `apart` says how it was made differently from others of its attack and size in the report. `source` is null where it
    is not known or does not apply, `variant` where the patch is scored as it was made.
    """

    name: str
    file: str | None
    fingerprint: str
    attack: str
    settings: AttackSettings = {}
    apart: str = ""
    target: int | None
    height: int
    width: int
    pixels: int
    place: Literal["random"] | tuple[int, int]
    geometry: str
    source: SourceFacts | None
    control: bool = False
    variant: VariantFacts | None = None

    @property
    def size(self) -> str:
        """Height, width and, where it does not fill them, the pixels it covers.

        Of shapes that are searched (DPR), the pixels alone: their boxes differ from patch to patch.
        """
        if "rays" in self.settings:
            return f"{self.pixels} pixels"
        filled = self.pixels == self.height * self.width
        return f"{self.height}x{self.width}" + ("" if filled else f" of {self.pixels} pixels")

    @property
    def method(self) -> str:
        """What patches that differ in their size only have in common: attack, place and aim."""
        place = "" if self.place == "random" else f" at {self.place[0]},{self.place[1]}"
        return f"{self.attack}{place}{' untargeted' if self.target is None else ''}"

    @property
    def family(self) -> str:
        """What patches that may be averaged over have in common: attack, size, place, aim and settings."""
        parts = f"{self.attack} {self.size}{self.method.removeprefix(self.attack)}", self.apart
        return " ".join(part for part in parts if part)


class ImageAttackFacts(Document):
    """One attack on every image by itself; `name` is unique among patches and attacks.

    `family` is what attacks that may be averaged over have in common: the attack and its settings, but for the target.
    `black_box` attacks see nothing but the outputs. `passes` are the forward and backward passes for an image, at most,
    where the attack tells them.
    """

    name: str
    family: str
    attack: str
    black_box: bool = False
    passes: tuple[int, int] | None = None
    fingerprint: str
    settings: AttackSettings = {}
    target: int | None
    source: SourceFacts


class CleanCell(Document):
    """Accuracy of one model at one precision without an attack."""

    model: str
    precision: str
    accuracy: Rate


class AttackCell(Document):
    """One patch or attack on one model at one precision, scored for one target (null: any wrong class)."""

    model: str
    precision: str
    attack: str
    target: int | None
    threat: Threat
    asr: Rate
    asr_all: Rate
    untargeted: Rate
    clean_accuracy: Rate
    robust_accuracy: Rate

    @classmethod
    def of(
        cls, score: Score, *, model: str, precision: str, attack: str, target: int | None, threat: Threat
    ) -> AttackCell:
        """Return the cell of a score."""
        rates = {name: Rate.of(getattr(score, name)) for name in Score.__dataclass_fields__}
        return cls(model=model, precision=precision, attack=attack, target=target, threat=threat, **rates)


class WorstCase(Document):
    """What all attacks together leave of one model at one precision; controls and moved patches are left out.

    `robust_accuracy` counts the images that are right clean and under every one of the attacks; `mean` is the mean of
    the attacks' own robust accuracies, which is what an attacker gets who has to choose one of them blindly.
    """

    model: str
    precision: str
    scope: Scope
    attacks: int
    mean: float
    robust_accuracy: Rate


class CertifiedCell(Document):
    """What a defense by masks predicts and proves for one model at one precision: a certificate.

    `size` is the side of a square patch in pixels, or height and width as `3x10`; `masks` is the number of masks,
    `tta` the views that the logits are averaged over, and `overlap` how many masks along each side lie over a place.
    `clean_accuracy` is that of the defended prediction on clean images; `certified_accuracy` counts the images whose
    defended prediction is right whatever one such patch shows and wherever it lies.

    It holds for the weights, masks (with what they show and the views) and images of these fingerprints, and for no
    others; where the `n` of its rates are fewer images, they were drawn balanced over classes. `passes` is the mean
    number of forward passes per image. Reports of older releases do not have them.
    """

    model: str
    precision: str
    method: Literal["double masking", "one round"] = "double masking"
    fill: Literal["mean", "interpolate"] = "mean"
    tta: Literal["none", "flip", "shift", "flip-shift"] = "none"
    overlap: int = 1
    size: int | str
    masks: int
    clean_accuracy: Rate
    certified_accuracy: Rate
    passes: float | None = None
    weights_fingerprint: str = ""
    masks_fingerprint: str = ""
    data_fingerprint: str = ""

    @property
    def patch(self) -> str:
        """How tables call the patch."""
        return f"{self.size}x{self.size}" if isinstance(self.size, int) else self.size

    @property
    def label(self) -> str:
        """How tables call the patch and the masks."""
        method = "" if self.method == "double masking" else f", {self.method}"
        fill = "" if self.fill == "mean" else ", interpolated"
        tta = "" if self.tta == "none" else f", {self.tta}"
        overlap = "" if self.overlap == 1 else f", overlap {self.overlap}"
        return f"{self.patch}, {self.masks} masks{method}{fill}{tta}{overlap}"


class EvaluationReport(Document):
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
    attacks: tuple[ImageAttackFacts, ...]
    clean: tuple[CleanCell, ...]
    cells: tuple[AttackCell, ...]
    worst_case: tuple[WorstCase, ...]
    certified: tuple[CertifiedCell, ...] = ()

    def patch(self, name: str) -> PatchFacts:
        """Return the patch of that name."""
        return next(patch for patch in self.patches if patch.name == name)

    def attack_facts(self) -> dict[str, PatchFacts | ImageAttackFacts]:
        """Patches and attacks by name, which is what cells refer to."""
        return {attack.name: attack for attack in (*self.patches, *self.attacks)}


def read_report(path: Path) -> EvaluationReport:
    """Read `report.json`, given the file or the folder that holds it.

    Raises:
        CheckpointError: no such file, or not a report this version can read.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"no report at {file}: make one with `qadtr-brevitas evaluate`")
    content = read_json(file)
    found = content.get("schema_version") if isinstance(content, dict) else None
    try:
        if found in _READABLE:
            return EvaluationReport.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: make it anew with `qadtr-brevitas evaluate`") from error
    raise CheckpointError(
        f"{file} has report schema version {found}, this release reads {_READABLE[0]} to {_READABLE[-1]}: make it "
        "anew with `qadtr-brevitas evaluate` (cells that are finished are not computed again)"
    )


def versions() -> dict[str, str]:
    """Versions of Python, this package and the packages that figures depend on."""
    found = {"python": platform.python_version(), "qadtr-brevitas": __version__}
    for package in ("torch", "brevitas", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
