"""What shells offer behind TAB for arguments and options that are names: recipes, studies, plug-ins, recipe keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

import click
from click.shell_completion import CompletionItem

from qadtr_brevitas.config import shipped
from qadtr_brevitas.core.registry import Registry

if TYPE_CHECKING:
    from pydantic import BaseModel

Completer: TypeAlias = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def complete_names(names: Callable[[], Mapping[str, str]]) -> Completer:
    """Return what offers names, with their descriptions."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = names().items()
        return [CompletionItem(name, help=text) for name, text in found if name.startswith(incomplete)]

    return complete


def complete_plugins(registry: Registry) -> Completer:
    """Return what offers the plug-ins of a registry, without importing them."""
    return complete_names(lambda: {name: text for name, (_, text) in sorted(registry.entries().items())})


def complete_recipes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the shipped recipes; behind RECIPE+ the defenses; and files, where neither fits."""
    recipe, plus, _ = incomplete.rpartition("+")
    named = shipped.shipped_defenses() if plus else shipped.shipped_recipes()
    described = {f"{recipe}{plus}{name}": shipped.recipe_description(path) for name, path in named.items()}
    found = [CompletionItem(name, help=text) for name, text in described.items() if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def complete_studies(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the shipped studies, and files where none fits."""
    described = {name: shipped.recipe_description(path) for name, path in shipped.shipped_studies().items()}
    found = [CompletionItem(name, help=text) for name, text in described.items() if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def complete_keys(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the keys of a recipe, as `train.epochs=`."""
    from qadtr_brevitas.config import Recipe

    found = _keys(Recipe, "")
    return [CompletionItem(f"{key}=", help=text) for key, text in found if key.startswith(incomplete)]


def _keys(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    from pydantic import BaseModel

    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""
