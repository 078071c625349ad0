"""A command that remembers how it was called, for reports that say how to redo them."""

from __future__ import annotations

import shlex

import click

_KEY = "qadtr_brevitas.command_line"


class RecordedCommand(click.Command):
    """Keeps its arguments as they were typed; `command_line` gives them back."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keeps the arguments and parses them as always."""
        ctx.meta[_KEY] = shlex.join(["qadtr-brevitas", ctx.info_name or "", *args])
        return super().parse_args(ctx, args)


def command_line() -> str:
    """The command that is running, as it can be typed in a shell."""
    return str(click.get_current_context().meta[_KEY])
