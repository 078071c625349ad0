"""Write the pages of the documentation that come from the code: commands, recipes, keys, plug-ins, and notebooks.

    python docs/generate.py        # `make docs` does it before it builds the site

The pages lie in docs/reference/generated, which is not kept in git.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from notebooks import notebook

from qadtr_brevitas.cli.main import COMMANDS, cli
from qadtr_brevitas.config import Recipe, shipped
from qadtr_brevitas.config.keys import plugin_keys
from qadtr_brevitas.core.registry import REGISTRIES

DOCS = Path(__file__).parent
FOLDER = DOCS / "reference" / "generated"
SITE = "https://github.com/qadtr-brevitas/qadtr-brevitas/blob/main/docs/tutorials"
WIDTH = 100


def command_page() -> str:
    """Return the help of every command."""
    parts = [
        "# Commands",
        "Every command takes `--help`, and most `--json`, `-q`, `--device`, `--seed` and `--threads`.",
    ]
    group = click.Context(cli, info_name="qadtr-brevitas", max_content_width=WIDTH, terminal_width=WIDTH)
    for name in COMMANDS:
        command = cli.get_command(group, name)
        assert command is not None
        parts += list(_help(command, click.Context(command, parent=group, info_name=name), level=2))
    return "\n\n".join(parts)


def _help(command: click.Command, context: click.Context, *, level: int) -> Iterator[str]:
    yield f"{'#' * level} {context.info_name}"
    yield f"```text\n{command.get_help(context).rstrip()}\n```"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _help(inner, click.Context(inner, parent=context, info_name=name), level=level + 1)


def recipe_page() -> str:
    """Return every shipped recipe and defense as it is, and a list of the studies."""
    parts = [
        "# Recipes",
        "`qadtr-brevitas recipes copy NAME` makes one your own; `NAME+DEFENSE` puts a defense on top.",
    ]
    for title, found in (("Recipes", shipped.shipped_recipes()), ("Defenses", shipped.shipped_defenses())):
        parts.append(f"## {title}")
        for name, path in found.items():
            parts += [f"### {name}", f"```yaml\n{path.read_text(encoding='utf-8').rstrip()}\n```"]
    rows = [(f"`{name}`", shipped.recipe_description(path)) for name, path in shipped.shipped_studies().items()]
    return "\n\n".join([*parts, "## Studies", _table(("study", "what it is"), rows)])


def key_page() -> str:
    """Return every key of a recipe with its default and description."""
    text = Recipe().dump_yaml(describe=True).rstrip()
    first = "Every key with its default. `train.epochs=3` on the command line sets one."
    return "\n\n".join(["# Keys of a recipe", first, f"```yaml\n{text}\n```"])


def plugin_page() -> str:
    """Return every plug-in with its keys and what its documentation says."""
    parts = ["# Plug-ins", "`qadtr-brevitas list KIND NAME --keys` prints the same."]
    for kind, registry in REGISTRIES.items():
        parts.append(f"## {kind}")
        for name in registry.builtin:
            plugin = registry.load(name)
            parts += [f"### {kind}: {name}", f"*{registry.describe(name)}*"]
            if isinstance(plugin, type):
                parts += [f"```text\n{inspect.getdoc(plugin)}\n```", *_keys(plugin)]
    return "\n\n".join(parts)


def _keys(plugin: type[Any]) -> Iterator[str]:
    rows = [(f"`{key.name}`", key.values, key.default, key.description) for key in plugin_keys(plugin)]
    if rows:
        yield _table(("key", "values", "default", "what it does"), rows)


def _table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)


def main() -> None:
    """Write all pages."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    pages = {"commands": command_page, "recipes": recipe_page, "keys": key_page, "plugins": plugin_page}
    for name, make in pages.items():
        (FOLDER / f"{name}.md").write_text(make().rstrip() + "\n", encoding="utf-8")
    for tutorial in (DOCS / "tutorials").glob("*.md"):
        (FOLDER / f"{tutorial.stem}.ipynb").write_text(notebook(tutorial, site=SITE) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
