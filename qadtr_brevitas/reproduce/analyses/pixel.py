"""Accuracy under attacks on every pixel, by the largest change eps that they may make."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from qadtr_brevitas.attacks.autoattack import AutoAttack
from qadtr_brevitas.attacks.base import PixelAttack
from qadtr_brevitas.attacks.pixel import Fgsm, MiFgsm, Pgd
from qadtr_brevitas.config.slots import Slot
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.registry import ATTACKS
from qadtr_brevitas.evaluation import NamedAttack
from qadtr_brevitas.evaluation.report import AttackCell, ImageAttackFacts
from qadtr_brevitas.reproduce.analyses.base import Analysis, AnalysisContext, Findings
from qadtr_brevitas.reproduce.analyses.charts import draw_records
from qadtr_brevitas.reproduce.analyses.document import Picture, Record
from qadtr_brevitas.reproduce.analyses.scores import AttackFacts, Facets, clean_records, mean_records, score
from qadtr_brevitas.reproduce.analyses.tables import percents, precision_table

if TYPE_CHECKING:
    PixelAttackSlot: TypeAlias = PixelAttack
else:
    PixelAttackSlot = Annotated[
        Any,
        Slot(
            ATTACKS,
            contract="qadtr_brevitas.attacks.base:PixelAttack",
            advice="it has no eps to change: choose pixel attacks, for instance attacks=[fgsm, pgd]",
        ),
    ]

Distance: TypeAlias = Annotated[float, Field(ge=0, le=1)]

MADE_AT_ATTACKED, MADE_AT_FLOAT = "on the precision attacked", "at 32 bit"


_WITHOUT_AUTOATTACK = (
    "These are upper bounds: at few bits the gradients that these attacks follow mislead, and AutoAttack, which also "
    "searches without them, may leave far less (attacks=[..., autoattack])."
)


@plugin
class Pixel(Analysis):
    """Accuracy by eps under pixel attacks at every precision (paper, Figure 1).

    Attacks are made on the precision that is attacked and, for comparison, at 32 bit. That attacks made at 32 bit fail
    at few bits proves nothing about an attacker who knows the precision. An image counts if it is classified correctly
    with and without the attack. The paper's fourth attack, `autoattack`, needs an extra of the installation and takes
    long.
    """

    attacks: Annotated[
        tuple[PixelAttackSlot, ...], Field(min_length=1, description="pixel attacks; their eps is replaced")
    ] = (Fgsm(), Pgd(), MiFgsm())
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
        """Score the attacks at each eps, and draw a picture for each attack."""
        distances = sorted(set(self.eps))
        attacks = [_with_eps(attack, eps) for attack in self.attacks for eps in distances if eps > 0]
        labels = _labels(self.attacks)
        found: list[Record] = []
        for loaded in context.models:
            report = score(context, loaded, attacks=attacks, transfer=self.transfer)
            if 0 in distances:
                for label in labels.values():
                    found += clean_records(report, {"attack": label, "eps": 0.0, "made": MADE_AT_ATTACKED})
            found += mean_records(report, "accuracy", lambda cell: cell.robust_accuracy, partial(_facets, labels))
        found.sort(
            key=lambda record: (
                record.facets["attack"],
                record.facets["made"] != MADE_AT_ATTACKED,
                record.facets["eps"],
            )
        )
        title = "Accuracy under pixel attacks by eps"
        notes = [
            "In percent of all test images: those classified correctly with and without the attack. Eps in [0, 1]."
        ]
        if not any(isinstance(attack, AutoAttack) for attack in self.attacks):
            notes.append(_WITHOUT_AUTOATTACK)
        facets = ("attack", "made", "eps")
        return Findings(
            title=title,
            records=found,
            tables=[precision_table(title, found, "accuracy", write=percents, facets=facets, notes=tuple(notes))],
            pictures=[_draw(context, found, label) for label in labels.values()],
        )


def _with_eps(attack: PixelAttack, eps: float) -> NamedAttack:
    return NamedAttack.of(attack.with_settings(eps=eps))


def _labels(attacks: Sequence[PixelAttack]) -> dict[str, str]:
    """Return how tables call the attacks, by family without eps: the name, with settings if two share it."""
    named = [NamedAttack.of(attack) for attack in attacks]
    names_by_family = {_without_eps(attack.family): attack.name for attack in named}
    names = list(names_by_family.values())
    return {family: name if names.count(name) == 1 else family for family, name in names_by_family.items()}


def _without_eps(family: str) -> str:
    return " ".join(word for word in family.split(" ") if not word.startswith("eps="))


def _facets(labels: Mapping[str, str], cell: AttackCell, facts: AttackFacts) -> Facets | None:
    if not isinstance(facts, ImageAttackFacts):
        return None
    made = MADE_AT_ATTACKED if cell.threat == "white-box" else MADE_AT_FLOAT
    return {"attack": labels[_without_eps(facts.family)], "eps": facts.settings["eps"], "made": made}


def _draw(context: AnalysisContext, found: Sequence[Record], label: str) -> Picture:
    file = f"pixel-{re.sub(r'[^A-Za-z0-9._]+', '-', label)}.png"
    draw_records(
        [record for record in found if (record.facets["attack"], record.facets["made"]) == (label, MADE_AT_ATTACKED)],
        context.output / file,
        along="eps",
        x_label="eps",
        y_label="accuracy (%)",
        title=f"{label}, made on the precision attacked",
    )
    caption = f"Accuracy under {label}, made on the precision attacked, by eps, with 95 % intervals."
    return Picture(file=file, caption=caption)
