"""Plug-ins from text: an attack with `key=value` settings, or written as in a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from qadtr_brevitas.config.problems import dotted, explain
from qadtr_brevitas.config.slots import Slot
from qadtr_brevitas.config.source import YamlError, parse, parse_value
from qadtr_brevitas.core.errors import Problem, RecipeError
from qadtr_brevitas.core.registry import Registry


def make_plugin(registry: Registry, name: str, options: Sequence[str]) -> Any:
    """Return a plug-in with the given `key=value` fields; values are YAML, as in a recipe.

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
            fields[key] = parse_value(value).plain()
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


def parse_plugin(registry: Registry, text: str, *, option: str) -> Any:
    """Return a plug-in that is written as in a recipe: a bare name, or `{name: pgd, eps: 0.03}`.

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
