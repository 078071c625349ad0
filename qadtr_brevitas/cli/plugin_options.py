"""Plug-ins named on the command line: an attack with `key=value`, a data set as NAME[:ROOT] or as in a run's recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import TypeAdapter, ValidationError

from qadtr_brevitas.config.problems import dotted, explain, fields_of
from qadtr_brevitas.config.slots import Slot, slot_name
from qadtr_brevitas.config.source import YamlError, parse
from qadtr_brevitas.core.errors import Problem, RecipeError, UsageError
from qadtr_brevitas.core.registry import DATASETS, Registry
from qadtr_brevitas.pipeline.directories import resolve_model_dir
from qadtr_brevitas.pipeline.recorded_data import make_dataset, recorded_dataset

if TYPE_CHECKING:
    from qadtr_brevitas.data.split import Split


def make_plugin(registry: Registry, name: str, options: Sequence[str]) -> Any:
    """A plug-in with the given `key=value` fields; values are YAML, as in a recipe.

    Raises:
        UsageError: there is no plug-in of that name.
        RecipeError: unknown keys and wrong values, all at once.
    """
    plugin = registry.load(name)
    problems: list[Problem] = []
    fields: dict[str, Any] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.append(Problem(text, "is no setting: write key=value, for instance size=8"))
            continue
        try:
            fields[key] = parse(value, line=None).plain()
        except YamlError as error:
            problems.append(Problem(key, f"the value {value!r} is not YAML: {error.reason}"))
    try:
        made = TypeAdapter(plugin).validate_python(fields)
    except ValidationError as error:
        problems += [Problem(dotted(place), message) for place, message in explain(error, plugin, fields)]
    else:
        if not problems:
            return made
    raise RecipeError(f"{registry.kind} {name}", problems)


def make_from_slot(registry: Registry, text: str, *, option: str) -> Any:
    """A plug-in written as in a recipe: a bare name, or `{name: pgd, eps: 0.03}`.

    Args:
        registry: where the names come from.
        text: YAML.
        option: what an error calls it.

    Raises:
        RecipeError: no plug-in of that name, unknown keys and wrong values, all at once.
    """
    try:
        value = parse(text, line=None).plain()
    except YamlError as error:
        problem = Problem(option, f"{text!r} is not YAML: {error.reason}")
        raise RecipeError(f"{registry.kind} {text}", [problem]) from error
    if isinstance(value, dict) and all(item is None for item in value.values()):
        # YAML reads {name:pgd} as one long key.
        problem = Problem(
            option, f"{text!r} sets nothing: write {{name: NAME, KEY: VALUE}}, with a space after each colon"
        )
        raise RecipeError(f"{registry.kind} {text}", [problem])
    try:
        return TypeAdapter(Annotated[Any, Slot(registry)]).validate_python(value)
    except ValidationError as error:
        problems = [Problem(dotted((option, *place)), message) for place, message in explain(error, object, value)]
        raise RecipeError(f"{registry.kind} {text}", problems) from error


def read_choice(choice: str) -> dict[str, Any]:
    """A data set chosen as NAME[:ROOT], as it is written in a recipe.

    Raises:
        UsageError: no such data set, or one that has no root.
    """
    name, _, root = choice.partition(":")
    fields = fields_of(DATASETS.load(name))
    if root and "root" not in fields:
        raise UsageError(f"data set {name} has no folder to read from: give --data {name}")
    return {"name": name, **({"root": root} if root else {})}


def find_dataset(model_dirs: Sequence[Path], choice: str | None) -> Any:
    """The data set chosen as NAME[:ROOT], or the one that all model directories were made on.

    Raises:
        UsageError: no such data set, or none chosen and none, or several, known from the models.
        CheckpointError: none chosen, and a directory holds no model.
    """
    if choice is not None:
        return make_dataset(read_choice(choice))
    found = [recorded_dataset(path) for path in model_dirs]
    for path, dataset in zip(model_dirs, found, strict=True):
        if dataset is None:
            resolve_model_dir(path)
            raise UsageError(
                f"{path} does not say which data set it was made for: choose one with --data NAME[:ROOT], "
                "see `qadtr-brevitas list datasets`"
            )
    if any(dataset != found[0] for dataset in found):
        names = ", ".join(dict.fromkeys(map(slot_name, found)))
        raise UsageError(f"the models were trained on different data ({names}): choose one with --data NAME[:ROOT]")
    return found[0]


def dataset_settings(dataset: Any) -> dict[str, Any]:
    """A data set's fields as JSON values."""
    return TypeAdapter(type(dataset)).dump_python(dataset, mode="json")


def load_split(dataset: Any, split: str, *, limit: int | None = None, seed: int = 0) -> Split:
    """Loads one split of a data set, or so many of its images, with a progress bar."""
    from qadtr_brevitas.cli.common import progress

    with progress(f"reading {slot_name(dataset)} {split} images") as report:
        return dataset.load(split, limit=limit, seed=seed, progress=report)
