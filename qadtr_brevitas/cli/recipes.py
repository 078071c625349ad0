"""`qadtr-brevitas recipes list|show|copy|validate`."""

from __future__ import annotations

from pathlib import Path

import click

from qadtr_brevitas.cli.common import command_of, emit, examples, output_options, say
from qadtr_brevitas.cli.completion import complete_keys, complete_recipes
from qadtr_brevitas.config import shipped
from qadtr_brevitas.core.table import Table


@click.group(
    "recipes",
    epilog=examples(
        "qadtr-brevitas recipes list",
        "qadtr-brevitas recipes show digits_qadtr",
        "qadtr-brevitas recipes copy digits_qadtr my_recipe.yaml",
        "qadtr-brevitas recipes validate my_recipe.yaml train.epochs=3",
    ),
)
def command() -> None:
    """List, show, copy and check recipes.

    A recipe is one YAML file that says everything about a training run.
    """


@command.command("list", epilog=examples("qadtr-brevitas recipes list", "qadtr-brevitas recipes list 'cifar10_*'"))
@click.argument("pattern", default="*", metavar="[GLOB]")
@output_options
def list_(pattern: str) -> None:
    """List the recipes that ship with the package, and the defenses that change them, as in digits_qat+pbat."""
    from fnmatch import fnmatch

    named = shipped.shipped_recipes() | {f"RECIPE+{name}": path for name, path in shipped.shipped_defenses().items()}
    found = {name: path for name, path in named.items() if fnmatch(name, pattern)}
    rows = tuple((name, shipped.recipe_description(path)) for name, path in found.items())
    table = Table("recipes", ("name", "description"), rows)
    emit(table.records(), table.rich_columns())
    say("next: qadtr-brevitas recipes show NAME, or qadtr-brevitas train NAME -o DIR")


@command.command(
    epilog=examples(
        "qadtr-brevitas recipes show digits_qadtr",
        "qadtr-brevitas recipes show cifar10_resnet20_qat+pbat quant.precisions=[8]",
        "qadtr-brevitas recipes show --keys digits_qadtr train.epochs=3",
    )
)
@click.argument("recipe", shell_complete=complete_recipes)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_keys)
@click.option("--keys", is_flag=True, help="Write out every key, with its value and what it is.")
@output_options
def show(recipe: str, overrides: tuple[str, ...], keys: bool) -> None:
    """Print a recipe: as it was written or, with --keys, --json, a defense or overrides, as it is understood."""
    from qadtr_brevitas.cli.common import wants_json

    if not (keys or overrides or wants_json() or len(shipped.split_name(recipe)) > 1):
        path = shipped.find_recipe(recipe)
        return emit(None, path.read_text(encoding="utf-8", errors="replace").rstrip("\n"))
    from qadtr_brevitas.config import load_recipe

    loaded = load_recipe(recipe, overrides)
    emit(loaded.model_dump(mode="json"), loaded.dump_yaml(describe=True).rstrip("\n"))


@command.command(epilog=examples("qadtr-brevitas recipes copy digits_qadtr my_recipe.yaml"))
@click.argument("recipe", shell_complete=complete_recipes)
@click.argument("target", type=click.Path(path_type=Path), default=Path())
@click.option("--force", is_flag=True, help="Overwrite a file that is already there.")
@output_options
def copy(recipe: str, target: Path, force: bool) -> None:
    """Copy a recipe to TARGET, a file or a folder (here, if left out), to change it."""
    written = shipped.copy_recipe(recipe, target, force=force)
    emit({"written": str(written)})
    say(f"wrote {written}; next: {command_of('train', written, '-o', 'DIR')}")


@command.command(epilog=examples("qadtr-brevitas recipes validate my_recipe.yaml train.epochs=3"))
@click.argument("recipe", shell_complete=complete_recipes)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_keys)
@output_options
def validate(recipe: str, overrides: tuple[str, ...]) -> None:
    """Check a recipe, with overrides as `train` takes them; every mistake is listed at once, with its line."""
    from qadtr_brevitas.config import load_recipe

    cost = load_recipe(recipe, overrides).train.mask_search_cost
    # Of several parts together there is no single file.
    parts = shipped.split_name(recipe)
    path = str(shipped.find_recipe(recipe)) if len(parts) == 1 else recipe
    emit({"recipe": path, "valid": True})
    if cost:
        say(cost)
    say(f"{path} is valid; next: {command_of('train', recipe, *overrides, '-o', 'DIR')}")
