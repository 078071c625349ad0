"""Accuracy under attacks on every pixel, the further they may go.

Scores pixel attacks at growing distances.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from qadtr_brevitas.attacks.base import PixelAttack
from qadtr_brevitas.config.slots import Slot, slot_name
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.registry import ATTACKS
from qadtr_brevitas.evaluation import NamedAttack
from qadtr_brevitas.evaluation.report import AttackCell, ImageAttackFacts, PatchFacts
from qadtr_brevitas.reproduce.analyses.base import Analysis, AnalysisContext, Findings, Picture, Record
from qadtr_brevitas.reproduce.analyses.charts import by_precision, draw_records, percents
from qadtr_brevitas.reproduce.analyses.patches import clean_records, records, score

Distance = Annotated[float, Field(ge=0, le=1)]
PixelAttackSlot = Annotated[Any, Slot(ATTACKS)]


@plugin
class Pixel(Analysis):
    """Accuracy against eps under pixel attacks at every precision (paper, Figure 1).

    Attacks are made on the precision attacked, and, for comparison, at 32 bit: that attacks made at 32 bit lose their
    force at few bits says nothing about an attacker who knows the bits. Images count that are right with and without
    the attack. The paper's fourth attack, `autoattack`, is an extra of the installation and takes long.
    """

    attacks: Annotated[
        tuple[PixelAttackSlot, ...], Field(min_length=1, description="pixel attacks; their eps is replaced")
    ] = ("fgsm", "pgd", "mi-fgsm")
    eps: Annotated[tuple[Distance, ...], Field(min_length=1, description="largest changes of a value, in [0, 1]")] = (
        0.0,
        0.005,
        0.01,
        0.015,
        0.02,
        0.03,
    )
    transfer: Annotated[
        Literal["float", "none"], Field(description="float: score attacks made at 32 bit at the others too")
    ] = "float"

    def run(self, context: AnalysisContext) -> Findings:
        """Scores, and draws a picture for each attack."""
        return run(self, context)


_OWN, _FLOAT = "on the precision attacked", "at 32 bit"


def run(analysis: Pixel, context: AnalysisContext) -> Findings:
    """As `Pixel.run` says."""
    distances = sorted(set(analysis.eps))
    attacks = [_at(attack, eps) for attack in analysis.attacks for eps in distances if eps > 0]
    kinds = _kinds(analysis.attacks)
    found: list[Record] = []
    for loaded in context.loaded_models:
        report = score(context, loaded, patches=[], attacks=attacks, transfer=analysis.transfer)
        if 0 in distances:
            for kind in kinds.values():
                found += clean_records(report, attack=kind, eps=0.0, made=_OWN)
        found += records(report, "accuracy", lambda cell: cell.robust_accuracy, partial(_made, kinds))
    found.sort(key=lambda record: (record.facets["attack"], record.facets["made"] != _OWN, record.facets["eps"]))
    title = "Accuracy under pixel attacks by eps"
    note = "In percent of all test images: those that are right with and without the attack. Eps in [0, 1]."
    facets = ("attack", "made", "eps")
    return Findings(
        title=title,
        records=found,
        tables=[by_precision(title, found, "accuracy", write=percents, facets=facets, notes=(note,))],
        pictures=[_draw(context, found, kind) for kind in kinds.values()],
    )


def _at(attack: Any, eps: float) -> NamedAttack:
    name = slot_name(attack)
    if not isinstance(attack, PixelAttack):
        raise UsageError(f"{name} has no eps to change: choose pixel attacks, for instance attacks=[fgsm, pgd]")
    return NamedAttack(name, attack.with_settings(eps=eps))


def _kinds(attacks: Sequence[Any]) -> dict[str, str]:
    """What tables call the attacks, by their families: their names, and settings where two share a name."""
    named = [NamedAttack(slot_name(attack), attack) for attack in attacks]
    families = {_family(attack.family): attack.name for attack in named}
    names = list(families.values())
    return {family: name if names.count(name) == 1 else family for family, name in families.items()}


def _family(family: str) -> str:
    """Without the distance, which tables say beside it."""
    return " ".join(word for word in family.split(" ") if not word.startswith("eps="))


def _made(kinds: Mapping[str, str], cell: AttackCell, facts: PatchFacts | ImageAttackFacts) -> Mapping[str, Any] | None:
    if not isinstance(facts, ImageAttackFacts):
        return None
    made = _OWN if cell.threat == "white-box" else _FLOAT
    return {"attack": kinds[_family(facts.family)], "eps": facts.settings["eps"], "made": made}


def _draw(context: AnalysisContext, found: Sequence[Record], kind: str) -> Picture:
    file = f"pixel-{re.sub(r'[^A-Za-z0-9._]+', '-', kind)}.png"
    draw_records(
        [record for record in found if record.facets["attack"] == kind and record.facets["made"] == _OWN],
        context.output / file,
        along="eps",
        x_label="eps",
        y_label="accuracy (%)",
        title=f"{kind}, made on the precision attacked",
    )
    return Picture(file, f"Accuracy under {kind}, made on the precision attacked, by eps, with 95 % intervals.")
