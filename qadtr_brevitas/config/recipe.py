"""The recipe: its sections together, and what has to fit between them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from qadtr_brevitas.config.dump import dump_yaml
from qadtr_brevitas.config.problems import fields_of, located_error
from qadtr_brevitas.config.sections import DataSection, ModelSection, QuantSection, RecipeSection, TrainSection
from qadtr_brevitas.core.errors import QadtrError
from qadtr_brevitas.core.precision import parse_precisions
from qadtr_brevitas.core.registry import SCHEDULES


class Recipe(RecipeSection):
    """The complete description of a run."""

    seed: int = Field(default=0, ge=0, description="source of everything random")
    model: ModelSection = Field(default_factory=ModelSection, description="the float network")
    data: DataSection = Field(default_factory=DataSection, description="images and labels")
    quant: QuantSection = Field(default_factory=QuantSection, description="quantization")
    train: TrainSection = Field(default_factory=TrainSection, description="training")

    @model_validator(mode="before")
    @classmethod
    def _give_schedule_its_choices(cls, data: Any) -> Any:
        return _with_choices(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        problems = [
            *_precision_problems(self),
            *_gradient_problems(self.train),
            *_scheduler_problems(self.train),
            *_mixing_problems(self),
        ]
        if problems:
            raise located_error(problems)
        return self

    def dump_yaml(self, *, describe: bool = False) -> str:
        """Return the recipe as YAML with every key; `describe` adds the description of each key as a comment."""
        return dump_yaml(self, describe=describe)


def _with_choices(data: dict[str, Any]) -> dict[str, Any]:
    """Give a schedule without choices all precisions of the model, or a fixed one the only precision there is."""
    quant, train = data.get("quant", {}), data.get("train", {})
    slot = train.get("precision", "uniform") if isinstance(train, dict) else None
    fields = {"schedule": slot} if isinstance(slot, str) else slot
    if not isinstance(quant, dict) or "precisions" not in quant or not isinstance(fields, dict):
        return data
    try:
        schedule = SCHEDULES.load(str(fields.get("schedule", fields.get("name"))))
        precisions = parse_precisions(quant["precisions"])
    # Validation of the schedule and of the precisions reports these errors.
    except (QadtrError, TypeError):
        return data
    known = fields_of(schedule)
    if "choices" in known and "choices" not in fields:
        fields = {**fields, "choices": quant["precisions"]}
    if "choice" in known and "choice" not in fields and len(precisions) == 1:
        fields = {**fields, "choice": precisions[0]}
    return {**data, "train": {**train, "precision": fields}}


def _precision_problems(recipe: Recipe) -> list[tuple[tuple[str, ...], str]]:
    allowed = recipe.quant.precisions
    if foreign := [str(precision) for precision in recipe.train.precision.choices if precision not in allowed]:
        have = ", ".join(map(str, allowed))
        rule = f"{', '.join(foreign)} must also be in quant.precisions, which has {have}"
        return [(("train", "precision", "choices"), rule)]
    return []


def _gradient_problems(train: TrainSection) -> list[tuple[tuple[str, ...], str]]:
    """Return what is wrong with the precisions of a gradient rule: those that are never trained have no effect."""
    possible = train.precision.possible()
    wanted = (train.gradient and train.gradient.precisions) or ()
    if foreign := [str(precision) for precision in wanted if precision not in possible]:
        rule = f"{', '.join(foreign)} must be in train.precision, which has {', '.join(map(str, possible))}"
        return [(("train", "gradient"), rule)]
    return []


def _mixing_problems(recipe: Recipe) -> list[tuple[tuple[str, ...], str]]:
    transform, size = recipe.data.transform, recipe.train.batch_size
    if transform is not None and transform.mixes and size % 2:
        return [(("train", "batch_size"), f"must be even to mix images with data.transform, got {size}")]
    return []


def _scheduler_problems(train: TrainSection) -> list[tuple[tuple[str, ...], str]]:
    if train.scheduler.warmup_epochs > train.epochs:
        rule = f"must be at most train.epochs, which is {train.epochs}, got {train.scheduler.warmup_epochs:g}"
        return [(("train", "scheduler", "warmup_epochs"), rule)]
    return []
