"""Keys that were renamed: a recipe with an old one is refused with the new name."""

from __future__ import annotations

from collections.abc import Container, Mapping

RENAMED_KEYS: Mapping[str, str] = {
    "edge": "first_last",
    "np": "area",
    "threshold_lr": "threshold_lr_scale",
}
"""Old to new name of each renamed key of a recipe section or plug-in."""

MOVED_KEYS: Mapping[tuple[str, str], str] = {
    ("percentile", "method"): "method.percentile",
    ("bias_correction", "weights"): "weights=[bias-correction]",
}
"""Old key, and the key of the same section that has its meaning, to how that is written."""


def moved_key(key: str, fields: Container[str]) -> str | None:
    """Return how a key that moved into another key of its section is written, or None if it did not move.

    Args:
        key: a key that may be an old one.
        fields: the keys of the section or plug-in it was given to.
    """
    found = (new for (old, home), new in MOVED_KEYS.items() if old == key and home in fields and old not in fields)
    return next(found, None)


def renamed_key(key: str, fields: Container[str]) -> str | None:
    """Return the new name of a key, or None if it was not renamed.

    Args:
        key: a key that may be an old one.
        fields: the keys of the section or plug-in it was given to. An old name counts only where the new one exists.
    """
    new = RENAMED_KEYS.get(key)
    return new if new is not None and new in fields and key not in fields else None


def with_present_names(settings: Mapping[str, object]) -> dict[str, object]:
    """Return stored settings of a plug-in, in which older releases may have written older names of keys."""
    return {RENAMED_KEYS.get(key, key): value for key, value in settings.items()}
