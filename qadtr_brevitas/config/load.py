"""Read and check recipes: from files, from the record of a run, and from Python."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qadtr_brevitas.config.layers import read_layers
from qadtr_brevitas.config.overrides import apply_override
from qadtr_brevitas.config.problems import dotted, explain
from qadtr_brevitas.config.recipe import Recipe
from qadtr_brevitas.config.recorded import rename_old_keys
from qadtr_brevitas.config.shipped import find_recipe, split_name
from qadtr_brevitas.config.source import YamlNode, parse, read_source
from qadtr_brevitas.core.errors import Problem, RecipeError


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a file, the name of a shipped recipe, or RECIPE+DEFENSE, the name of a shipped defense that changes it.
        overrides: `key.sub=value` texts, as on the command line; a value of null deletes the key.

    Raises:
        UsageError: there is no such recipe or defense, or the file is not a mapping.
        RecipeError: the recipe has problems; the error lists all of them, each with its line.
    """
    parts = split_name(source)
    place = str(find_recipe(source)) if len(parts) == 1 else str(source)
    return _checked(read_layers(source), overrides, source=place)


def load_recorded_recipe(file: Path) -> Recipe:
    """Read the recipe that a run directory records; keys that were renamed since may have their old names.

    Raises:
        UsageError: the file cannot be read, or holds no mapping.
        RecipeError: the recipe has problems; the error lists all of them, each with its line.
    """
    root = read_source(file)
    rename_old_keys(root, Recipe)
    return _checked(root, (), source=str(file))


def make_recipe(fields: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str) -> Recipe:
    """Check a recipe that does not come from a file.

    Args:
        fields: sections as nested mappings of plain values.
        overrides: as of `load_recipe`.
        source: the name of the recipe in errors, for instance the command.

    Raises:
        RecipeError: the recipe has problems; the error lists all of them.
    """
    return _checked(parse(json.dumps(fields), line=None), overrides, source=source)


def _checked(root: YamlNode, overrides: Sequence[str], *, source: str) -> Recipe:
    problems = [problem for text in overrides if (problem := apply_override(root, text))]
    data = root.plain()
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        found = explain(error, Recipe, data)
        problems += [Problem(dotted(place), message, root.line_of(place)) for place, message in found]
    else:
        if not problems:
            return recipe
    raise RecipeError(source, sorted(problems, key=lambda problem: problem.line or 0))
