"""The data set that a model was made on, as its config or the recipe of its run records it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import TypeAdapter, ValidationError

from qadtr_brevitas.config import load_recorded_recipe
from qadtr_brevitas.config.problems import dotted, explain
from qadtr_brevitas.config.slots import Slot
from qadtr_brevitas.core.errors import Problem, RecipeError
from qadtr_brevitas.core.files import read_json
from qadtr_brevitas.core.registry import DATASETS
from qadtr_brevitas.pipeline.directories import CONFIG_FILE, LAST_FOLDER, recipe_of_model

if TYPE_CHECKING:
    from qadtr_brevitas.data.base import Dataset

_DATASET: TypeAdapter[Dataset] = TypeAdapter(Annotated[Any, Slot(DATASETS)])


def make_dataset(settings: Mapping[str, Any]) -> Dataset:
    """Return a data set from its name and settings as a recipe holds them.

    Raises:
        ValidationError: no such data set, or settings that it does not have.
    """
    return _DATASET.validate_python(dict(settings))


def recorded_dataset(path: Path) -> Dataset | None:
    """Return the data set that a model was made on, or None if nothing records it.

    Args:
        path: a model or run directory.

    Raises:
        RecipeError: the recorded data set or its settings do not exist.
        CheckpointError: the config of the model cannot be read.
    """
    for folder in (path, path / LAST_FOLDER):
        if (folder / CONFIG_FILE).is_file() and (dataset := _dataset_in(folder / CONFIG_FILE)):
            return dataset
    # Models of earlier releases record their data set in the recipe of their run only.
    recipe = recipe_of_model(path)
    return None if recipe is None else load_recorded_recipe(recipe).data.dataset


def _dataset_in(config: Path) -> Dataset | None:
    content = read_json(config)
    settings = cast("dict[str, Any]", content).get("data") if isinstance(content, dict) else None
    if not settings:
        return None
    try:
        return make_dataset(settings)
    except ValidationError as error:
        problems = [Problem(dotted(("data", *place)), message) for place, message in explain(error, object, settings)]
        raise RecipeError(str(config), problems) from error
