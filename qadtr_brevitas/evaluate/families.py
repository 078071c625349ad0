"""Which patches of a report may be averaged over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qadtr_brevitas.report import PatchFacts

_SAID_OTHERWISE = ("target",)


def told_apart(patches: Sequence[PatchFacts]) -> tuple[PatchFacts, ...]:
    """The patches, those of one attack and size each with the settings in which they differ, but for the target.

    A mean of patches from pictures and from noise, say, would be a figure of neither.
    """
    made = [patch for patch in patches if not (patch.control or patch.variant)]
    return tuple(patch if patch.control or patch.variant else _apart(patch, made) for patch in patches)


def _apart(patch: PatchFacts, made: Sequence[PatchFacts]) -> PatchFacts:
    alike = [other.settings for other in made if other.family == patch.family]
    settings = {key: None for other in alike for key in other if key not in _SAID_OTHERWISE}
    differing = [key for key in settings if any(_value(one, key) != _value(patch.settings, key) for one in alike)]
    words = " ".join(f"{key}={patch.settings[key]}" for key in differing if key in patch.settings)
    return patch.model_copy(update={"apart": words})


def _value(settings: dict[str, Any], key: str) -> str | None:
    """Lists and tuples of the same values are the same setting."""
    return None if key not in settings else str(settings[key]).translate(str.maketrans("()", "[]"))
