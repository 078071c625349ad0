"""The sections of a study file. Each key has a type, a range, a default and a description; no other keys exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, JsonValue, PlainSerializer, model_validator

from qadtr_brevitas.attacks.base import ImageAttack, PatchAttack
from qadtr_brevitas.config.sections import AttackSlot, RecipeSection
from qadtr_brevitas.config.slots import Slot
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import PatchSizeField, PrecisionField
from qadtr_brevitas.core.precision import DEFAULT_BITS, PrecisionLike
from qadtr_brevitas.core.registry import ANALYSES
from qadtr_brevitas.evaluation.certification import Certification, CertifyMethod
from qadtr_brevitas.evaluation.mask_fill import MaskFillKind
from qadtr_brevitas.evaluation.tta import TtaKind
from qadtr_brevitas.quant.inference import InferenceMode, parse_mode

if TYPE_CHECKING:
    from qadtr_brevitas.reproduce.analyses.base import Analysis

    AnalysisSlot: TypeAlias = Analysis
else:
    AnalysisSlot = Annotated[Any, Slot(ANALYSES)]


def _read_mode(value: PrecisionLike | InferenceMode) -> InferenceMode:
    try:
        return parse_mode(value)
    except UsageError as error:
        raise ValueError(str(error)) from error


ModeField: TypeAlias = Annotated[InferenceMode, BeforeValidator(_read_mode), PlainSerializer(str)]
"""A precision, or several together: 4, "8+4+2", "random(8+4+2)", "vote(8+4+2)"."""
Name: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Seed: TypeAlias = Annotated[int, Field(ge=0)]
Target: TypeAlias = Annotated[int, Field(ge=0)] | None
RecipeChanges: TypeAlias = dict[str, JsonValue]


class StudyModel(RecipeSection):
    """A row of the study: one network for each seed and, with `each`, for each precision."""

    label: str | None = Field(default=None, description="name in tables; null: its name in the study")
    paper: str | dict[str, str] | None = Field(
        default=None, description="its row in the paper's table, or a row for each evaluation"
    )
    recipe: str | None = Field(default=None, description="a recipe, a file or a shipped one; null: the study's")
    defense: str | None = Field(default=None, description="a shipped defense to add to the recipe")
    set: RecipeChanges = Field(default={}, description="recipe keys to change, as {train.epochs: 3}")
    each: tuple[PrecisionField, ...] = Field(default=(), description="precisions that get a network of their own")
    start: str | None = Field(default=None, description="model of this study whose 32-bit weights it starts from")
    train: bool = Field(default=True, description="false: convert and calibrate only (PTQ)")
    path: str | None = Field(default=None, description="a finished run or model directory, instead of a recipe")
    seeds: tuple[Seed, ...] = Field(default=(), description="empty: the study's")
    precisions: tuple[ModeField, ...] = Field(default=(), description="precisions to score; empty: the study's")
    scored: bool = Field(default=True, description="false: use it only as a start of others or to make patches on")

    @model_validator(mode="after")
    def _check_origin(self) -> StudyModel:
        training = {"recipe": self.recipe, "defense": self.defense, "set": self.set, "each": self.each}
        used = [key for key, value in {**training, "start": self.start}.items() if value]
        if self.path is not None and (used or not self.train):
            raise ValueError(
                f"a model with a path is finished and cannot be trained: leave out {used[0] if used else 'train'}, or "
                "path"
            )
        return self


class StudyAttack(RecipeSection):
    """An attack that makes universal patches, or one that attacks each image by itself."""

    attack: AttackSlot = Field(description="the attack and its settings, without its target")
    per_image: bool | None = Field(
        default=None, description="attack each image by itself; null: only if the attack makes no universal patches"
    )
    targets: tuple[Target, ...] = Field(
        default=(),
        description="target classes, null for untargeted; empty: the first three for universal patches, else null",
    )
    made_at: tuple[ModeField, ...] = Field(
        default=(), description="precisions that patches are made at; empty: those that are scored"
    )
    made_on: tuple[str, ...] = Field(
        default=(), description="models of this study it is made on, `own` for the attacked one; empty: own"
    )

    @property
    def is_per_image(self) -> bool:
        """Whether each image is attacked by itself."""
        return not isinstance(self.attack, PatchAttack) if self.per_image is None else self.per_image

    @property
    def target_classes(self) -> tuple[int | None, ...]:
        """The target classes; None stands for an untargeted attack."""
        return self.targets or ((None,) if self.is_per_image else (0, 1, 2))

    @model_validator(mode="after")
    def _check_kind(self) -> StudyAttack:
        if self.is_per_image and not isinstance(self.attack, ImageAttack):
            raise ValueError("this attack cannot attack single images: give per_image=false")
        if not self.is_per_image and not isinstance(self.attack, PatchAttack):
            raise ValueError("this attack cannot make universal patches: give per_image=true")
        if self.is_per_image and self.made_at:
            raise ValueError("an attack on each image is made at every precision that is scored: leave out made_at")
        return self


class StudyAudit(RecipeSection):
    """Checks, on each network of an evaluation, that tell a robust network from an attack that failed."""

    twin: str | None = Field(default=None, description="model of this study without the defense, otherwise alike")
    ablations: tuple[str, ...] = Field(default=(), description="models of this study that lack a part of the defense")
    precisions: tuple[PrecisionField, ...] = Field(
        default=(), description="precisions to audit, of those that a network is scored at; empty: all of them"
    )
    images: int = Field(default=200, ge=20, description="test images")
    profile: Literal["quick", "full"] = Field(default="quick", description="how thorough its attacks are")


class StudyCertification(RecipeSection):
    """Patches against which the networks of an evaluation are certified, at each precision they are scored at."""

    sizes: tuple[PatchSizeField, ...] = Field(min_length=1, description="sizes of patches in pixels, as 5 or 3x10")
    masks: int | None = Field(
        default=None, ge=2, description="masks along each side of an image; null: 6, or 5 in one round"
    )
    method: CertifyMethod = Field(default="double masking", description="the certifier")
    fill: MaskFillKind = Field(default="mean", description="what masks show, best what train.masks.fill was")
    tta: TtaKind = Field(
        default="none", description="test-time augmentation: views whose logits are averaged, which proves more"
    )
    overlap: int = Field(
        default=1, ge=1, description="masks along each side over a place, whose logits are averaged: 2 proves most"
    )
    images: int | None = Field(
        default=None, ge=1, description="certify at most so many of the test images, balanced over classes; null: all"
    )

    @model_validator(mode="after")
    def _check_masks(self) -> StudyCertification:
        try:
            names = [str(certification) for certification in self.certifications]
        except UsageError as error:
            raise ValueError(str(error)) from error
        if len(set(names)) < len(names):
            raise ValueError("give each patch size once")
        return self

    @property
    def certifications(self) -> tuple[Certification, ...]:
        """One for each size."""
        options = (self.masks, self.method, self.fill, self.tta, self.overlap)
        return tuple(Certification(size, *options) for size in self.sizes)

    def count(self, images: int) -> int:
        """Return how many of so many test images are certified."""
        return min(images, self.images or images)


class StudyEvaluation(RecipeSection):
    """A set of attacks on some models, and certificates of them, with one report for each network."""

    attacks: tuple[str, ...] = Field(default=(), description="names of attacks of this study")
    protocol: Literal["unseen"] | None = Field(
        default=None,
        description="replace the first attack by patches unlike those of training, which are derived from it",
    )
    models: tuple[str, ...] = Field(default=(), description="models to evaluate; empty: all that are scored")
    eot: tuple[ModeField, ...] = Field(
        default=(), description="sets of precisions that attacks on each image are also averaged over"
    )
    certify: StudyCertification | None = Field(default=None, description="also certify the networks")
    audit: StudyAudit | None = Field(default=None, description="also audit the networks")
    transfer: Literal["all", "float", "none"] = Field(
        default="all", description="attacks scored at precisions they were not made at: all, those made at 32 bit, none"
    )


class StudyAnalysis(RecipeSection):
    """An analysis of some models."""

    analysis: AnalysisSlot = Field(description="the analysis and its settings")
    models: tuple[str, ...] = Field(min_length=1, description="models to analyze")


class Budget(RecipeSection):
    """The budget of images, attack steps and seeds."""

    images: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        default=1000, description="number of test images, class-balanced, or all"
    )
    batch_size: int = Field(
        default=250, ge=1, description="images in one forward pass, and in a chunk of an attack on each image"
    )
    patch_images: int = Field(default=10_000, ge=1, description="training images that patches are made on")
    held_out: int = Field(default=1000, ge=1, description="training images that patches are chosen on")
    steps: int | None = Field(default=None, ge=1, description="steps of every iterative attack; null: its own")
    pictures: bool = Field(default=True, description="draw patches and patched images for the reports")
    seed: int = Field(default=0, ge=0, description="seed of images, places and attacks, the same for every model")


class Study(RecipeSection):
    """A whole study at one scale."""

    title: str = Field(min_length=1, description="title of its tables")
    paper: str | None = Field(default=None, description="table or figure of the paper to compare with, such as table11")
    recipe: str | None = Field(default=None, description="recipe of models without one")
    set: RecipeChanges = Field(default={}, description="recipe keys to change in all models")
    start: str | None = Field(default=None, description="model that models without a start of their own start from")
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1, description="training seeds")
    precisions: tuple[ModeField, ...] = Field(
        default=tuple(map(parse_mode, DEFAULT_BITS)),
        min_length=1,
        description="precisions to score, as far as a model has them",
    )
    models: dict[Name, StudyModel] = Field(min_length=1, description="the models, by name")
    attacks: dict[Name, StudyAttack] = Field(default={}, description="the attacks, by name")
    evaluations: dict[Name, StudyEvaluation] = Field(default={}, description="the evaluations, by name")
    analyses: dict[Name, StudyAnalysis] = Field(default={}, description="the analyses, by name")
    budget: Budget = Field(default_factory=Budget, description="images, attack steps and seeds")

    def start_of(self, model: str) -> str | None:
        """Return the name of the model that a model starts from: its own start, or else the study's.

        A finished model starts from none, and the study's start does not start from itself.
        """
        section = self.models[model]
        if section.path is not None:
            return None
        return section.start or (self.start if self.start != model else None)

    def starts(self) -> dict[str, list[str]]:
        """Return, for each model, the models that must be made before it."""
        return {name: [start] if (start := self.start_of(name)) else [] for name in self.models}
