"""Attacks: one file each, over one shared patch geometry. An attack never decides whether it succeeded.

Every registered attack is an attribute by its class name, imported when it is first used: `attacks.Lavan(size=8)`.
"""

from typing import TYPE_CHECKING, Any

from qadtr_brevitas.core.registry import ATTACKS

if TYPE_CHECKING:
    from qadtr_brevitas.attacks.a_qapa import AQapa as AQapa
    from qadtr_brevitas.attacks.autoattack import AutoAttack as AutoAttack
    from qadtr_brevitas.attacks.dpr import Dpr as Dpr
    from qadtr_brevitas.attacks.gap import Gap as Gap
    from qadtr_brevitas.attacks.lavan import Lavan as Lavan
    from qadtr_brevitas.attacks.location_patch import LocationPatch as LocationPatch
    from qadtr_brevitas.attacks.patch_auto import PatchAuto as PatchAuto
    from qadtr_brevitas.attacks.pixel import Fgsm as Fgsm
    from qadtr_brevitas.attacks.pixel import MiFgsm as MiFgsm
    from qadtr_brevitas.attacks.pixel import Pgd as Pgd
    from qadtr_brevitas.attacks.random_patch import RandomPatch as RandomPatch
    from qadtr_brevitas.attacks.sparse_rs import SparseRs as SparseRs


def _names() -> dict[str, str]:
    """Return the registered name of each attack by its class name."""
    return {target.partition(":")[2]: name for name, (target, _) in ATTACKS.entries().items()}


def __getattr__(name: str) -> Any:
    """Import an attack when it is first used (PEP 562)."""
    if name.startswith("_") or name not in (names := _names()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return ATTACKS.load(names[name])


def __dir__() -> list[str]:
    return sorted(_names())
