"""Scores pixel attacks at growing distances."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qadtr_brevitas.analyze.base import Context, Findings, Picture, Record
from qadtr_brevitas.analyze.curves import draw_records
from qadtr_brevitas.analyze.scores import clean_records, records, score
from qadtr_brevitas.analyze.tables import by_precision, percents
from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.evaluate import NamedAttack
from qadtr_brevitas.recipe.slots import slot_name
from qadtr_brevitas.report import AttackCell, ImageAttackFacts, PatchFacts

if TYPE_CHECKING:
    from qadtr_brevitas.analyze.pixel import Pixel

_OWN, _FLOAT = "on the precision attacked", "at 32 bit"


def run(analysis: Pixel, context: Context) -> Findings:
    """As `Pixel.run` says."""
    distances = sorted(set(analysis.eps))
    attacks = [_at(attack, eps) for attack in analysis.attacks for eps in distances if eps > 0]
    kinds = _kinds(analysis.attacks)
    found: list[Record] = []
    for subject in context.subjects:
        report = score(context, subject, patches=[], attacks=attacks, transfer=analysis.transfer)
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
    if not hasattr(attack, "eps"):
        raise UsageError(f"{name} has no eps to change: choose pixel attacks, for instance attacks=[fgsm, pgd]")
    return NamedAttack(name, replace(attack, eps=eps))


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


def _draw(context: Context, found: Sequence[Record], kind: str) -> Picture:
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
