"""Reading and checking a study: its base, its scale, and what is changed on the command line.

Taking keys out of a study: `models.ptq=null` on the command line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from qadtr_brevitas.config.layers import merge, read_layers, without_removed
from qadtr_brevitas.config.problems import dotted, explain, fields_of, section_in
from qadtr_brevitas.config.shipped import recipe_folder, shipped_studies
from qadtr_brevitas.config.slots import Slot, slot_in
from qadtr_brevitas.config.source import Node, YamlError, parse
from qadtr_brevitas.core.errors import Problem, QadtrError, RecipeError, UsageError, suggest
from qadtr_brevitas.reproduce.study.sections import Study, StudyModel

NO_KEYS = "{} is a single value or a list, it has no keys"


def remove_path(root: Node, path: str) -> Problem | None:
    """Takes a key out of the tree of a study, in place.

    Keys that a section may have and does not have are out already; any other is a mistake.

    Args:
        root: the tree.
        path: dotted path of the key.
    """
    node: Node | None = root
    owner: Any = Study
    *parents, last = path.split(".")
    for part in parents:
        if problem := _unknown(node, owner, path, part):
            return problem
        field, node = fields_of(owner).get(part), _children(node).get(part)
        if node is not None and (node.children is None or node.is_list):
            return Problem(path, NO_KEYS.format(part))
        owner = get_args(owner)[1] if get_origin(owner) is dict else _below(field, node)
    if problem := _unknown(node, owner, path, last):
        return problem
    if node is not None and node.children is not None:
        node.children.pop(last, None)
    return None


def _unknown(node: Node | None, owner: Any, path: str, key: str) -> Problem | None:
    """What to say of a key that is not there and could not be."""
    known = {*map(str, _children(node)), *fields_of(owner)}
    return None if key in known else Problem(path, f"there is no {key!r} to take out: {suggest(key, known)}")


def _children(node: Node | None) -> dict[int | str, Node]:
    return (node.children if node else None) or {}


def _below(field: FieldInfo | None, node: Node | None) -> Any:
    """What says which keys a value may have: a section, a mapping of sections, a plug-in; None where nothing does."""
    if field is None:
        return None
    if slot := slot_in(field.annotation, field.metadata):
        return _plugin(slot, node)
    return field.annotation if get_origin(field.annotation) is dict else section_in(field.annotation)


def _plugin(slot: Slot, node: Node | None) -> Any:
    name = _children(node).get(slot.key)
    try:
        return slot.registry.load(str(name.scalar)) if name else None
    except (QadtrError, ImportError, AttributeError):
        # Told when the study is checked.
        return None


SCALES, SCALE_NAMES = "scales", ("smoke", "small", "full")
OWN, SET = "own", "set"


def find_study(source: str | Path) -> Path:
    """Finds a study by path or, failing that, by the name of a shipped one, with or without .yaml.

    Raises:
        UsageError: there is neither; the nearest shipped names are offered.
    """
    path = Path(source)
    # What studies have in common is there too, for bases.
    shipped = recipe_folder() / "studies" / f"{str(source).removesuffix('.yaml')}.yaml"
    for file in (path, shipped):
        if file.is_file():
            return file
    raise UsageError(f"there is no study {str(source)!r}: {suggest(path.stem, shipped_studies())}")


def load_study(source: str | Path, overrides: Sequence[str] = (), *, scale: str = "small") -> Study:
    """Reads and checks a study.

    Args:
        source: a file, or the name of a shipped study.
        overrides: `key.sub=value` texts, as on the command line; a value of null takes the key out.
        scale: which of its scales; what it says changes the rest of the file.

    Raises:
        UsageError: there is no such study or scale, or the file is no mapping.
        RecipeError: something is wrong in it; the error lists everything that is, each with its place.
    """
    root = without_removed(_at_scale(read_layers(source, find=find_study), scale, source=str(source)))
    problems = [problem for text in overrides if (problem := _override(root, text))]
    data = root.plain()
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        problems += [Problem(dotted(p), text, root.line_of(p)) for p, text in explain(error, Study, data)]
    else:
        problems += [Problem(dotted(p), text, root.line_of(p)) for p, text in _unknown_names(study)]
        if not problems:
            return study
    raise RecipeError(str(find_study(source)), sorted(problems, key=lambda problem: problem.line or 0))


def dump_json(study: Study) -> str:
    """The study with every key written out, as JSON, which is YAML as well."""
    return json.dumps(study.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def _at_scale(root: Node, scale: str, *, source: str) -> Node:
    assert root.children is not None
    scales = root.children.pop(SCALES, None)
    known = dict(scales.children or {}) if scales else {}
    if scale in known:
        return merge(root, _removing(known[scale])) if known[scale].children is not None else root
    if known or scale not in SCALE_NAMES:
        raise UsageError(f"study {source} has no scale {scale!r}: {suggest(scale, map(str, known))}")
    return root


def _removing(node: Node) -> Node:
    """The tree with nulls that take out what may be there; in `set` they are values that recipes get."""
    if node.children is None or node.is_list:
        return replace(node, removes=node.children is None and node.scalar is None)
    children = {
        key: child if key == SET and child.children else _removing(child) for key, child in node.children.items()
    }
    return replace(node, children=children)


def _override(root: Node, text: str) -> Problem | None:
    """Puts `key.sub=value` into the tree in place."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        return Problem(text, "is no override: write key=value, for instance budget.images=100")
    try:
        found = parse(value, line=None)
    except YamlError as error:
        return Problem(path, f"the value {value!r} is not YAML: {error.reason}")
    if found.children is None and found.scalar is None:
        return remove_path(root, path.strip())
    node = root
    *parents, last = path.strip().split(".")
    for part in parents:
        assert node.children is not None
        node = node.children.setdefault(part, Node(None, children={}))
        if node.children is None or node.is_list:
            return Problem(path, NO_KEYS.format(part))
    assert node.children is not None
    node.children[last] = found
    return None


def _unknown_names(study: Study) -> Iterator[tuple[tuple[str, ...], str]]:
    """Places of a study that name a model or an attack that it does not have."""
    for name, model in study.models.items():
        if model.start is not None:
            yield from _check(("models", name, "start"), [model.start], study.models)
        if model.path is None and (model.recipe or study.recipe) is None:
            yield ("models", name), "needs a recipe of its own, as the study names none"
    if study.start is not None:
        yield from _check(("start",), [study.start], study.models)
    for name, attack in study.attacks.items():
        yield from _check(("attacks", name, "made_on"), attack.made_on, {**study.models, OWN: None})
    for name, evaluation in study.evaluations.items():
        yield from _check(("evaluations", name, "attacks"), evaluation.attacks, study.attacks)
        yield from _check(("evaluations", name, "models"), evaluation.models, study.models)
        if evaluation.audit is not None:
            others = [*([evaluation.audit.twin] if evaluation.audit.twin else []), *evaluation.audit.ablations]
            yield from _check(("evaluations", name, "audit"), others, study.models)
        first = study.attacks.get(evaluation.attacks[0]) if evaluation.attacks else None
        if evaluation.protocol and (first is None or first.is_per_image):
            yield ("evaluations", name, "attacks"), "a protocol starts from the first attack, which must make patches"
    for name, analysis in study.analyses.items():
        yield from _check(("analyses", name, "models"), analysis.models, study.models)
    yield from _circles(study)


def _check(place: tuple[str, ...], names: Sequence[str], known: object) -> Iterator[tuple[tuple[str, ...], str]]:
    choices = list(known) if isinstance(known, dict) else []
    for name in names:
        if name not in choices:
            yield place, f"there is no {name!r} in this study: {suggest(name, choices)}"


def _circles(study: Study) -> Iterator[tuple[tuple[str, ...], str]]:
    for name in study.models:
        seen, at = {name}, start_of(study, name)
        while at is not None and at in study.models:
            if at in seen:
                yield ("models", name, "start"), "starts from itself: leave out one start"
                break
            seen.add(at)
            at = start_of(study, at)


def start_of(study: Study, name: str) -> str | None:
    """The model that a model starts from: its own, or the study's unless it is that itself."""
    model: StudyModel = study.models[name]
    if model.path is not None:
        return None
    return model.start or (study.start if study.start != name else None)
