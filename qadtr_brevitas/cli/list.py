"""`qadtr-brevitas list KIND [GLOB]`."""

from __future__ import annotations

from dataclasses import asdict, astuple
from fnmatch import fnmatch

import click

from qadtr_brevitas.cli.common import emit, examples, output_options
from qadtr_brevitas.cli.completion import complete_names
from qadtr_brevitas.config import shipped
from qadtr_brevitas.core.errors import UsageError, suggest
from qadtr_brevitas.core.registry import REGISTRIES
from qadtr_brevitas.core.table import Table

KINDS = ("models", *REGISTRIES, "recipes", "defenses", "studies")


@click.command(
    "list",
    epilog=examples(
        "qadtr-brevitas list models 'cifar_*'",
        "qadtr-brevitas list attacks",
        "qadtr-brevitas list attacks lavan --keys",
        "qadtr-brevitas list recipes --json",
    ),
)
@click.argument("kind", metavar="|".join(KINDS), shell_complete=complete_names(lambda: dict.fromkeys(KINDS, "")))
@click.argument("pattern", default="*", metavar="[GLOB]")
@click.option("--keys", is_flag=True, help="Show the keys of each: allowed values, defaults and what they do.")
@output_options
def command(kind: str, pattern: str, keys: bool) -> None:
    """List the names of a kind with their descriptions; a shell pattern selects some.

    Models are timm's, those of this package included, and torchvision's that timm lacks.
    """
    if kind not in KINDS:
        raise UsageError(f"cannot list {kind!r}: {suggest(kind, KINDS)}")
    entries = _entries(kind, pattern)
    if not entries:
        raise UsageError(f"none of the {kind} has a name like {pattern!r}: {suggest(pattern, _entries(kind, '*'))}")
    if keys:
        return _emit_keys(kind, list(entries))
    table = Table(kind, ("name", "description"), tuple(entries.items()))
    emit(table.records(), table.rich_columns())


_FILES = {
    "recipes": shipped.shipped_recipes,
    "defenses": shipped.shipped_defenses,
    "studies": shipped.shipped_studies,
}


def _entries(kind: str, pattern: str) -> dict[str, str]:
    if kind == "models":
        from qadtr_brevitas.models.create import model_names

        return model_names(pattern)
    if kind in _FILES:
        found = _FILES[kind]().items()
        return {name: shipped.recipe_description(path) for name, path in found if fnmatch(name, pattern)}
    registry = REGISTRIES[kind]
    return {name: registry.describe(name) for name in registry.names(pattern)}


def _emit_keys(kind: str, names: list[str]) -> None:
    registry = REGISTRIES.get(kind)
    plugins = {name: registry.load(name) for name in names} if registry else {}
    # Targets and formats are data without keys of their own.
    plugins = {name: plugin for name, plugin in plugins.items() if isinstance(plugin, type)}
    if not plugins:
        raise UsageError(f"{kind} have no keys: remove --keys")
    from rich.console import Group

    from qadtr_brevitas.config.keys import plugin_keys

    keys = {name: plugin_keys(plugin) for name, plugin in plugins.items()}
    header = ("key", "values", "default", "description")
    tables = [Table(name, header, tuple(map(astuple, found)), labels=4) for name, found in keys.items()]
    emit(
        {name: [asdict(key) for key in found] for name, found in keys.items()}, Group(*(each.rich() for each in tables))
    )
