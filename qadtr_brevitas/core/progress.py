"""One type for the progress of a long task, and its share in a longer one."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called after each part of a long task."""

    def __call__(self, done: int, total: int, note: str = "", /) -> object:
        """Note that `done` of `total` parts are done; `total` is 0 as long as it is not known."""
        ...


def part_of(progress: Progress | None, number: int, parts: int, label: str = "") -> Progress | None:
    """Return the progress of one of several tasks of equal length, as a share of all of them.

    Args:
        progress: told about all tasks together; None if nobody wants to know.
        number: which task this is, from 0.
        parts: how many tasks there are.
        label: comes before the note of the task.
    """
    if progress is None:
        return None
    return lambda done, total, note="": progress(number * total + done, parts * total, f"{label} {note}".strip())


def silent(done: int, total: int, note: str = "", /) -> None:
    """Note nothing."""


def format_seconds(seconds: float) -> str:
    """Return a time of two units at most, such as `3 h 20 min`, `12 min` or `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
