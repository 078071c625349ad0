"""The ensemble patch-auto beside searches for a patch on each image, for the worst case over attacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from qadtr_brevitas.attacks.patch_auto import PatchAuto
from qadtr_brevitas.attacks.patch_settings import PatchSettings
from qadtr_brevitas.attacks.random_patch import RandomPatch
from qadtr_brevitas.evaluation.image_attacks import NamedAttack

EnsembleVersion: TypeAlias = Literal["fast", "standard"]

_GEOMETRY = ("size", "area", "shape", "place", "keep_out")


def missing_ensembles(attacks: Sequence[NamedAttack], version: EnsembleVersion) -> list[NamedAttack]:
    """Return the ensembles that a worst case over attacks lacks.

    A single search for a patch on each image is weaker than an ensemble, so each of them gets one of its size, shape,
    place and target, unless there is one already. A patch of noise is no search.

    Args:
        attacks: per-image attacks.
        version: of the ensembles.
    """
    searched = [attack.plugin for attack in attacks if isinstance(attack.plugin, PatchSettings)]
    there = {_aim(plugin) for plugin in searched if isinstance(plugin, PatchAuto)}
    wanted = {_aim(plugin): plugin for plugin in searched if not isinstance(plugin, RandomPatch)}
    return [NamedAttack.of(_ensemble(plugin, version)) for aim, plugin in wanted.items() if aim not in there]


def _ensemble(plugin: PatchSettings, version: EnsembleVersion) -> PatchAuto:
    geometry = {name: getattr(plugin, name) for name in _GEOMETRY}
    return PatchAuto(**geometry, target=_target(plugin), version=version)


def _aim(plugin: PatchSettings) -> tuple[object, ...]:
    """Return what a search and its ensemble have in common."""
    return *(getattr(plugin, name) for name in _GEOMETRY), _target(plugin)


def _target(plugin: PatchSettings) -> int | None:
    target: int | None = getattr(plugin, "target", None)
    return target
