"""The sections of a study file. Each key has a type, a range, a default and a description; no other keys exist."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from qadtr_brevitas.attacks.base import ImageAttack, PatchAttack
from qadtr_brevitas.config.sections import AttackSlot, RecipeSection
from qadtr_brevitas.config.slots import Slot
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import PrecisionField
from qadtr_brevitas.core.precision import DEFAULT_BITS
from qadtr_brevitas.core.registry import ANALYSES
from qadtr_brevitas.quant.inference import InferenceMode, parse_mode


def _read_access(value: Any) -> InferenceMode:
    try:
        return parse_mode(value)
    except UsageError as error:
        raise ValueError(str(error)) from error


AccessField = Annotated[InferenceMode, BeforeValidator(_read_access), PlainSerializer(str)]
"""A precision, or several together: 4, "8+4+2", "random(8+4+2)", "vote(8+4+2)"."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Target = Annotated[int, Field(ge=0)] | None


class StudyModel(RecipeSection):
    """A row of the study: one network, or one for each bit-width, and for each seed."""

    label: str | None = Field(default=None, description="how tables call it; null: its name")
    paper: str | dict[str, str] | None = Field(
        default=None, description="its row in the paper's table; by evaluation where the rows differ"
    )
    recipe: str | None = Field(default=None, description="a recipe, a file or a shipped one; null: the study's")
    defense: str | None = Field(default=None, description="a shipped defense that is added to the recipe")
    set: dict[str, Any] = Field(default={}, description="recipe keys to change, as {train.epochs: 3}")
    each: tuple[PrecisionField, ...] = Field(
        default=(), description="a network of its own for each of these precisions"
    )
    start: str | None = Field(default=None, description="the model of this study whose 32-bit weights it starts from")
    train: bool = Field(default=True, description="false: converted and calibrated only (PTQ)")
    path: str | None = Field(default=None, description="a finished run or model directory, instead of a recipe")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), description="empty: the study's")
    precisions: tuple[AccessField, ...] = Field(default=(), description="what is scored; empty: the study's")
    scored: bool = Field(default=True, description="false: only others start from it, or patches are made on it")

    @model_validator(mode="after")
    def _one_origin(self) -> StudyModel:
        made = [key for key in ("recipe", "defense", "set", "each", "start") if getattr(self, key)]
        if self.path is not None and (made or not self.train):
            raise ValueError(f"a finished model is not made anew: leave out {made[0] if made else 'train'}, or path")
        return self


class StudyAttack(RecipeSection):
    """Universal patches, or an attack on each image by itself."""

    attack: AttackSlot = Field(description="the attack and its settings; targets are given here")
    per_image: bool | None = Field(
        default=None, description="attack each image by itself; null: if the attack cannot do otherwise"
    )
    targets: tuple[Target, ...] = Field(
        default=(),
        description="classes, null for any wrong one; empty: the first three for universal patches, else null",
    )
    made_at: tuple[AccessField, ...] = Field(
        default=(), description="precisions patches are made at; empty: those that are scored"
    )
    made_on: tuple[str, ...] = Field(
        default=(), description="models of this study it is made on, own among them; empty: own"
    )

    @property
    def is_per_image(self) -> bool:
        """Whether every image is attacked by itself."""
        return not isinstance(self.attack, PatchAttack) if self.per_image is None else self.per_image

    @property
    def aims(self) -> tuple[int | None, ...]:
        """The classes it aims at, None for any wrong one."""
        return self.targets or ((None,) if self.is_per_image else (0, 1, 2))

    @model_validator(mode="after")
    def _possible(self) -> StudyAttack:
        for per_image, contract, what in (
            (True, ImageAttack, "attack single images"),
            (False, PatchAttack, "make universal patches"),
        ):
            if self.is_per_image is per_image and not isinstance(self.attack, contract):
                raise ValueError(f"this attack cannot {what}: give per_image={str(not per_image).lower()}")
        if self.is_per_image and self.made_at:
            raise ValueError("an attack on each image is made at every precision that is scored: leave out made_at")
        return self


class StudyAudit(RecipeSection):
    """Checks that tell a robust network from an attack that failed, on each network of an evaluation."""

    twin: str | None = Field(default=None, description="model of this study: the same network without the defense")
    ablations: tuple[str, ...] = Field(default=(), description="models of this study that lack a part of the defense")
    precisions: tuple[PrecisionField, ...] = Field(
        default=(), description="precisions to audit, as far as a network is scored at them; empty: all of these"
    )
    images: int = Field(default=200, ge=20, description="test images")
    profile: Literal["quick", "full"] = Field(default="quick", description="what its attacks cost")


class StudyEvaluation(RecipeSection):
    """A set of attacks that models are put through: one report for each network."""

    attacks: tuple[str, ...] = Field(default=(), description="names of attacks of this study")
    protocol: Literal["unseen"] | None = Field(
        default=None,
        description="instead of the first attack, what the protocol makes of it: patches unlike those of training",
    )
    models: tuple[str, ...] = Field(default=(), description="models it is for; empty: all that are scored")
    eot: tuple[AccessField, ...] = Field(default=(), description="several precisions that image attacks look at too")
    audit: StudyAudit | None = Field(default=None, description="also audit the networks")
    transfer: Literal["all", "float", "none"] = Field(
        default="all", description="what is moved to precisions it was not made at: all, what was made at 32 bit, none"
    )


class StudyAnalysis(RecipeSection):
    """An analysis of some models."""

    analysis: Annotated[Any, Slot(ANALYSES)] = Field(description="the analysis and its settings")
    models: tuple[str, ...] = Field(min_length=1, description="models it is for")


class Budget(RecipeSection):
    """What the figures cost."""

    images: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        default=1000, description="test images, class-balanced, or all"
    )
    batch_size: int = Field(default=250, ge=1, description="images at once, and in a chunk of an image attack")
    patch_images: int = Field(default=10_000, ge=1, description="training images that patches are made on")
    held_out: int = Field(default=1000, ge=1, description="training images that choose patches")
    steps: int | None = Field(default=None, ge=1, description="steps of every attack that has steps; null: their own")
    pictures: bool = Field(default=True, description="draw patches and patched images into the reports")
    seed: int = Field(default=0, ge=0, description="of images, places and attacks, the same for every model")


class Study(RecipeSection):
    """Everything that is to be said about a study, at one scale."""

    title: str = Field(min_length=1, description="what it compares")
    paper: str | None = Field(default=None, description="the paper's table or figure it is compared with, as table11")
    recipe: str | None = Field(default=None, description="the recipe of models that name none")
    set: dict[str, Any] = Field(default={}, description="recipe keys to change in all models that are made")
    start: str | None = Field(default=None, description="what models start from that say nothing else")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1, description="training seeds")
    precisions: tuple[AccessField, ...] = Field(
        default=tuple(map(parse_mode, DEFAULT_BITS)),
        min_length=1,
        description="what is scored, as far as a model has it",
    )
    models: dict[Name, StudyModel] = Field(min_length=1, description="the models, by name")
    attacks: dict[Name, StudyAttack] = Field(default={}, description="the attacks, by name")
    evaluations: dict[Name, StudyEvaluation] = Field(default={}, description="which attacks, by name")
    analyses: dict[Name, StudyAnalysis] = Field(default={}, description="the analyses, by name")
    budget: Budget = Field(default_factory=Budget, description="what the figures cost")
