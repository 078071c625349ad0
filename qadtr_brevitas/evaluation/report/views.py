"""Means over the cells of a report: of one model, and of patches or attacks that belong together.

Which patches of a report may be averaged over.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from qadtr_brevitas.evaluation.metrics import Mean, mean
from qadtr_brevitas.evaluation.report.schema import (
    AttackCell,
    EvaluationReport,
    ImageAttackFacts,
    ModelFacts,
    PatchFacts,
    Rate,
)
from qadtr_brevitas.quant.inference import sorted_modes

FLOAT = "32"

Figure: TypeAlias = Callable[[AttackCell], Rate]
"""Which rate of a cell is meant; the ASR where it is not said."""

_Facts: TypeAlias = PatchFacts | ImageAttackFacts


@dataclass(frozen=True)
class View:
    """The cells of one model and one family of patches or attacks, and means over them.

    Args:
        report: the report.
        model: the attacked model.
        family: patches or attacks that may be averaged over.
        variant: how its patches were moved or turned, in words; None for patches as they were made.
    """

    report: EvaluationReport
    model: ModelFacts
    family: str
    variant: str | None = None

    @cached_property
    def knowledge(self) -> str:
        """What attacks of this family know of a model that they are made on, as tables call it."""
        if self._is_given:
            return "as given"
        blind = any(isinstance(facts, ImageAttackFacts) and facts.black_box for facts in self._members)
        return "black-box" if blind else "white-box"

    def clean(self, precision: str) -> Rate | None:
        """Accuracy without an attack; None where the model was not evaluated at this precision."""
        where = (self.model.name, precision)
        return next((cell.accuracy for cell in self.report.clean if (cell.model, cell.precision) == where), None)

    def white_box(self, precision: str, what: Figure | None = None) -> Mean | None:
        """Mean over what was made on this model at this precision; of given patches, whose source is unknown, all."""
        wanted = "transfer" if self._is_given else "white-box"
        return _mean([cell for cell, _ in self._cells(precision) if cell.threat == wanted], what)

    def eot(self, precision: str, what: Figure | None = None) -> Mean | None:
        """Mean over what was made on a mean over precisions of this model."""
        return _mean([cell for cell, _ in self._cells(precision) if cell.threat == "eot"], what)

    def made_at(self, precision: str, source: str, fingerprint: str | None = None) -> Mean | None:
        """Mean ASR of what was made at precision, or mean over precisions, `source`, on this model or on another."""
        origin = (fingerprint or self.model.fingerprint, source)
        return _mean([cell for cell, facts in self._cells(precision) if _origin(facts) == origin])

    def control(self, precision: str, what: Figure | None = None) -> Mean | None:
        """Mean of the random patches of the family's geometry, for the family's targets."""
        aims = {(facts.geometry, facts.target) for facts in self._members if isinstance(facts, PatchFacts)}
        return _mean([cell for cell, facts in self._controls(precision) if (facts.geometry, cell.target) in aims], what)

    def any(self, precision: str) -> Mean | None:
        """Mean over everything of the family: for its denominators, which do not depend on where it was made."""
        return _mean([cell for cell, _ in self._cells(precision)])

    @cached_property
    def _facts(self) -> dict[str, _Facts]:
        return self.report.attack_facts()

    @cached_property
    def _members(self) -> list[_Facts]:
        return [facts for facts in self._facts.values() if self._is_member(facts)]

    @cached_property
    def _is_given(self) -> bool:
        """Whether nothing is known of where the patches of the family were made."""
        return all(facts.source is None for facts in self._members)

    def _is_member(self, facts: _Facts) -> bool:
        if isinstance(facts, ImageAttackFacts):
            return facts.family == self.family and self.variant is None
        made = self._facts[facts.variant.of] if facts.variant else facts
        label = facts.variant.label if facts.variant else None
        return not facts.control and (made.family, label) == (self.family, self.variant)

    def _cells(self, precision: str) -> list[tuple[AttackCell, _Facts]]:
        names = {facts.name: facts for facts in self._members}
        return [(cell, names[cell.attack]) for cell in self._all(precision) if cell.attack in names]

    def _controls(self, precision: str) -> list[tuple[AttackCell, PatchFacts]]:
        names = {patch.name: patch for patch in self.report.patches if patch.control}
        return [(cell, names[cell.attack]) for cell in self._all(precision) if cell.attack in names]

    def _all(self, precision: str) -> list[AttackCell]:
        where = (self.model.name, precision)
        return [cell for cell in self.report.cells if (cell.model, cell.precision) == where]


def families(report: EvaluationReport) -> list[str]:
    """Return the kinds of patches, then of attacks, that tables average over, in the order of the report."""
    patches = [patch.family for patch in report.patches if not patch.control and not patch.variant]
    return list(dict.fromkeys([*patches, *(attack.family for attack in report.attacks)]))


def family_members(report: EvaluationReport, family: str) -> list[_Facts]:
    """Return the patches as they were made, and the attacks, of a family."""
    return [
        facts
        for facts in report.attack_facts().values()
        if facts.family == family and (isinstance(facts, ImageAttackFacts) or not (facts.control or facts.variant))
    ]


def sources(report: EvaluationReport, family: str) -> dict[str, str]:
    """Fingerprints of the models that a family was made on, and what to call them."""
    names = {model.fingerprint: model.name for model in reversed(report.models)}
    found = [facts.source for facts in family_members(report, family) if facts.source]
    return {source.fingerprint: names.get(source.fingerprint, source.name) for source in found}


def source_precisions(report: EvaluationReport, family: str, fingerprint: str) -> list[str]:
    """Return the precisions, and means over them, that a family was made at on a model; from many bits to few."""
    found = [facts.source for facts in family_members(report, family) if facts.source]
    return sorted_modes({source.precision for source in found if source.fingerprint == fingerprint})


def attacked_precisions(report: EvaluationReport) -> list[str]:
    """Every precision that some model was attacked at, highest first."""
    return sorted_modes({precision for model in report.models for precision in model.precisions})


def targets_note(report: EvaluationReport, family: str) -> str:
    """Target classes of a family, by number and name."""
    numbers = sorted({facts.target for facts in family_members(report, family) if facts.target is not None})
    classes = report.data.classes
    names = [str(n) if classes[n] == str(n) else f"{n} ({classes[n]})" for n in numbers]
    return ", ".join(names) or "none, any wrong class counts"


def _origin(facts: _Facts) -> tuple[str, str] | None:
    return (facts.source.fingerprint, facts.source.precision) if facts.source else None


def _mean(cells: Sequence[AttackCell], what: Figure | None = None) -> Mean | None:
    return mean([(what(cell) if what else cell.asr).share for cell in cells])


_SAID_OTHERWISE = ("target",)


def disambiguate_patches(patches: Sequence[PatchFacts]) -> tuple[PatchFacts, ...]:
    """Return the patches, those of one attack and size each with the settings in which they differ, but for the target.

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
    """Return the same for a list and a tuple of the same values, which are the same setting."""
    return json.dumps(value, sort_keys=True)
