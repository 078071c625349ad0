"""Errors a user may see. Each message says what was given, the rule, and what to type next."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


class QadtrError(Exception):
    """Base of every error meant for users; the command line prints it without a traceback."""

    exit_code = 1


class UsageError(QadtrError):
    """A wrong name, value or combination of options; exit code 2, as for any bad usage."""

    exit_code = 2


class PluginError(QadtrError):
    """A plug-in that cannot be imported, or lacks what its kind has to define."""


class DataError(QadtrError):
    """A data set that is missing, empty, corrupt, or does not fit the model."""


class CheckpointError(QadtrError):
    """A model directory, checkpoint or patch file that cannot be read, written or does not fit."""


class TrainingError(QadtrError):
    """Training that cannot continue, for instance because the loss is no longer finite."""


class ExportError(QadtrError):
    """A network that a format cannot hold, or an exported file that computes something else than the network."""


class StudyError(QadtrError):
    """A study of which parts could not be made."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a recipe.

    Args:
        path: dotted path of the key, for instance `train.attack.steps`.
        message: what is wrong and the rule.
        line: 1-based line in the file, or None for a key given on the command line.
    """

    path: str
    message: str
    line: int | None = None


class RecipeError(UsageError):
    """Everything that is wrong in one recipe, all at once."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n".join(map(self._line, self.problems)))

    def _line(self, problem: Problem) -> str:
        place = f"{self.source}:{problem.line}" if problem.line else "command line"
        # Keys that do not go together have no path of their own.
        return ": ".join(filter(None, (place, problem.path, problem.message)))


def first_names(names: Sequence[str], *, most: int = 4) -> str:
    """Return names for a message: the first ones, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def suggest(name: str, choices: Iterable[str]) -> str:
    """Words an unknown name: the nearest right one if there is one, else all of them."""
    choices = sorted(choices)
    if not choices:
        return "there is none to choose from"
    near = get_close_matches(name, choices, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"choose from {', '.join(choices)}"
