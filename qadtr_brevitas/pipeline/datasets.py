"""The data set that a command works on: chosen as NAME[:ROOT], or the one that a model records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import TypeAdapter, ValidationError

from qadtr_brevitas.config import load_recorded_recipe
from qadtr_brevitas.config.plugins import parse_plugin
from qadtr_brevitas.config.problems import dotted, explain, fields_of
from qadtr_brevitas.config.slots import Slot, slot_name
from qadtr_brevitas.core.errors import Problem, RecipeError, UsageError
from qadtr_brevitas.core.files import read_json
from qadtr_brevitas.core.registry import DATASETS
from qadtr_brevitas.pipeline.directories import CONFIG_FILE, LAST_FOLDER, recipe_of_model, resolve_model_dir

if TYPE_CHECKING:
    from qadtr_brevitas.data.base import Dataset

_DATASET: TypeAdapter[Dataset] = TypeAdapter(Annotated[Any, Slot(DATASETS)])


def make_dataset(settings: Mapping[str, Any]) -> Dataset:
    """Return a data set from its name and settings as a recipe holds them.

    Raises:
        ValidationError: no such data set, or settings that it does not have.
    """
    return _DATASET.validate_python(dict(settings))


def parse_dataset_choice(choice: str) -> dict[str, Any]:
    """Return a data set chosen as NAME[:ROOT], or as `{name: NAME, ...}` with any settings, in the form of a recipe.

    Raises:
        UsageError: no such data set, or a root where it has none.
        RecipeError: settings that it does not have.
    """
    if choice.lstrip().startswith("{"):
        return Slot(DATASETS).write(parse_plugin(DATASETS, choice, option="--data"))
    name, _, root = choice.partition(":")
    name, named = DATASETS.divide(name)
    fields = fields_of(DATASETS.load(name))
    if root and "root" not in fields:
        raise UsageError(f"data set {name} reads no folder: give --data {name}")
    return {"name": name, **({"root": root} if root else named)}


def find_dataset(
    model_dirs: Sequence[Path], choice: str | None, *, report: Callable[[str], None] | None = None
) -> Dataset:
    """Return the data set chosen as NAME[:ROOT], or the one that all model directories were made on.

    Args:
        model_dirs: model or run directories.
        choice: the data set chosen; None for that of the models.
        report: called with a sentence if test images have to be held out from images that lie in one place.

    Raises:
        UsageError: the data set does not exist; or none is chosen, and the models record none or different ones.
        CheckpointError: none is chosen, and a directory holds no model.
    """
    dataset, decision = _find(model_dirs, choice).completed(("test",))
    if decision is not None and report is not None:
        report(decision)
    return dataset


def _find(model_dirs: Sequence[Path], choice: str | None) -> Dataset:
    if choice is not None:
        return make_dataset(parse_dataset_choice(choice))
    found = [_dataset_of_model(path) for path in model_dirs]
    if any(dataset != found[0] for dataset in found):
        names = ", ".join(dict.fromkeys(map(slot_name, found)))
        raise UsageError(f"the models were trained on different data ({names}): choose one with --data NAME[:ROOT]")
    return found[0]


def _dataset_of_model(path: Path) -> Dataset:
    if (dataset := recorded_dataset(path)) is None:
        resolve_model_dir(path)
        raise UsageError(
            f"{path} does not name its data set: choose one with --data NAME[:ROOT], see `qadtr-brevitas list datasets`"
        )
    return dataset


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
