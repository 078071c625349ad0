"""Checks that the names in a study refer to models and attacks that it has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from typing import TypeAlias

from qadtr_brevitas.core.errors import suggest
from qadtr_brevitas.reproduce.study.sections import Study, StudyEvaluation

OWN = "own"
"""What `made_on` calls the attacked network itself."""

Mistake: TypeAlias = tuple[tuple[str, ...], str]
"""The place of a key, and what is wrong with its value."""


def wrong_references(study: Study) -> Iterator[Mistake]:
    """Yield every name of a model or an attack that the study does not have, and models that start from each other."""
    for name, model in study.models.items():
        if model.start is not None:
            yield from _unknown(("models", name, "start"), [model.start], study.models)
        if model.path is None and (model.recipe or study.recipe) is None:
            yield ("models", name), "the model needs a recipe, because the study has none: give recipe"
    if study.start is not None:
        yield from _unknown(("start",), [study.start], study.models)
    for name, attack in study.attacks.items():
        yield from _unknown(("attacks", name, "made_on"), attack.made_on, [*study.models, OWN])
    for name, evaluation in study.evaluations.items():
        yield from _wrong_in_evaluation(study, name, evaluation)
    for name, analysis in study.analyses.items():
        yield from _unknown(("analyses", name, "models"), analysis.models, study.models)
    yield from _cycle(study)


def _wrong_in_evaluation(study: Study, name: str, evaluation: StudyEvaluation) -> Iterator[Mistake]:
    place = ("evaluations", name)
    yield from _unknown((*place, "attacks"), evaluation.attacks, study.attacks)
    yield from _unknown((*place, "models"), evaluation.models, study.models)
    if audit := evaluation.audit:
        others = [*([audit.twin] if audit.twin else []), *audit.ablations]
        yield from _unknown((*place, "audit"), others, study.models)
    first = study.attacks.get(evaluation.attacks[0]) if evaluation.attacks else None
    if evaluation.protocol and (first is None or first.is_per_image):
        yield (*place, "attacks"), "a protocol is derived from the first attack, which must make universal patches"


def _unknown(place: tuple[str, ...], names: Iterable[str], known: Collection[str]) -> Iterator[Mistake]:
    for name in names:
        if name not in known:
            yield place, f"there is no {name!r} in this study: {suggest(name, known)}"


def _cycle(study: Study) -> Iterator[Mistake]:
    try:
        TopologicalSorter(study.starts()).prepare()
    except CycleError as error:
        # graphlib lists each start before what starts from it.
        cycle = list(reversed(error.args[1]))
        yield ("models", cycle[0], "start"), f"models start from each other ({' from '.join(cycle)}): leave out a start"
