"""Which patches of a report may be averaged over."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from qadtr_brevitas.report.schema import PatchFacts

_SAID_OTHERWISE = ("target",)


def told_apart(patches: Sequence[PatchFacts]) -> tuple[PatchFacts, ...]:
    """The patches, those of one attack and size each with the settings in which they differ, but for the target.

    A mean of patches from pictures and from noise, say, would be a figure of neither. Random patches and moved ones
    stay as they are: they go with the patches they are compared with or made of.

    Args:
        patches: all of a report. What they were told apart by elsewhere does not count.
    """
    patches = [patch.model_copy(update={"apart": ""}) for patch in patches]
    values: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    made = [patch for patch in patches if not (patch.control or patch.variant)]
    keys = {key for patch in made for key in patch.settings if key not in _SAID_OTHERWISE}
    for patch in made:
        for key in keys:
            values[patch.family][key].add(_text(patch.settings.get(key)))

    def apart(patch: PatchFacts) -> PatchFacts:
        differing = [key for key in patch.settings if len(values[patch.family][key]) > 1]
        words = " ".join(f"{key}={patch.settings[key]}" for key in differing)
        return patch.model_copy(update={"apart": words})

    return tuple(patch if patch.control or patch.variant else apart(patch) for patch in patches)


def _text(value: Any) -> str:
    """The same for a list and a tuple of the same values, which are the same setting."""
    return json.dumps(value, sort_keys=True)
