"""How much an audit spends on the attacks inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from qadtr_brevitas.core.errors import UsageError, suggest

ProfileName: TypeAlias = Literal["quick", "full"]


@dataclass(frozen=True, kw_only=True)
class AuditProfile:
    """How much an audit spends: the sizes of the attacks inside it.

    Args:
        steps: k; success of the longest attack is compared after k, 2k and 4k steps.
        compared_steps: steps of the attacks that are compared with each other.
        restarts: starts of the attack with restarts, k steps from each.
        queries: queries for each image of the attack without gradients.
        noise_patches: patches of noise, over all images together.
        directions: random directions around each start in which the loss is probed.
        draws: outputs of a random network that are averaged in one step.
        ensemble: version of the ensemble `patch-auto`.
        pixel_steps: steps of PGD, whose success is compared with that of AutoAttack.
        autoattack: version of AutoAttack.
    """

    steps: int
    compared_steps: int
    restarts: int
    queries: int
    noise_patches: int
    directions: int
    draws: int
    ensemble: Literal["fast", "standard"] = "fast"
    pixel_steps: int = 20
    autoattack: Literal["fast", "standard"] = "fast"


PROFILES: dict[str, AuditProfile] = {
    "quick": AuditProfile(
        steps=15, compared_steps=10, restarts=3, queries=300, noise_patches=10_000, directions=20, draws=5
    ),
    "full": AuditProfile(
        steps=50,
        compared_steps=50,
        restarts=5,
        queries=5_000,
        noise_patches=50_000,
        directions=100,
        draws=20,
        ensemble="standard",
        pixel_steps=50,
        autoattack="standard",
    ),
}


def find_profile(name: str) -> AuditProfile:
    """Return the profile of a name.

    Raises:
        UsageError: there is no such profile.
    """
    if name not in PROFILES:
        raise UsageError(f"unknown audit profile {name!r}: {suggest(name, PROFILES)}")
    return PROFILES[name]
