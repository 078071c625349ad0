"""`qadtr-brevitas info PATH`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import click

from qadtr_brevitas.cli.common import emit, examples, output_options


@click.command(
    "info",
    epilog=examples(
        "qadtr-brevitas info runs/qadtr",
        "qadtr-brevitas info runs/qadtr/last --json",
        "qadtr-brevitas info runs/qadtr/patches/NAME.safetensors",
    ),
)
@click.argument("path", type=click.Path(path_type=Path))
@output_options
def command(path: Path) -> None:
    """Say what PATH is: a model, run, patch, report or weights file, and what is known about it."""
    from qadtr_brevitas.pipeline.inspect import describe

    facts = describe(path)
    emit(facts, "\n".join(_lines(facts)))


def _lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from _lines(cast("dict[str, Any]", value), indent + "  ")
        else:
            yield f"{indent}{key}: {_word(value)}"


def _word(value: Any) -> str:
    if value is None or value == {} or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, cast("list[Any]", value)))
    return str(value)
