"""`qadtr-brevitas list KIND [GLOB]`."""

from __future__ import annotations

from fnmatch import fnmatch

import click

from qadtr_brevitas.cli.common import emit, examples, output_options
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
        "qadtr-brevitas list recipes --json",
    ),
)
@click.argument("kind", metavar="|".join(KINDS))
@click.argument("pattern", default="*", metavar="[GLOB]")
@output_options
def command(kind: str, pattern: str) -> None:
    """List the names of a kind, with what they are; a shell pattern picks some.

    Models are timm's, those of this package included, and torchvision's that timm lacks.
    """
    if kind not in KINDS:
        raise UsageError(f"cannot list {kind!r}: {suggest(kind, KINDS)}")
    table = Table(kind, ("name", "description"), tuple(_entries(kind, pattern).items()))
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
