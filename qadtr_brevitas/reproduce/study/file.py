"""Reading a study: its base, its scale, and changes from the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from qadtr_brevitas.config.layers import drop_deleted, merge, read_layers
from qadtr_brevitas.config.problems import dotted, explain
from qadtr_brevitas.config.shipped import recipe_folder, shipped_studies
from qadtr_brevitas.config.source import YamlError, YamlNode, parse
from qadtr_brevitas.core.errors import Problem, RecipeError, UsageError, suggest
from qadtr_brevitas.reproduce.study.references import wrong_references
from qadtr_brevitas.reproduce.study.removal import is_value, mark_nulls, no_keys, remove_key
from qadtr_brevitas.reproduce.study.sections import Study

SCALE_NAMES = ("smoke", "small", "full")
_SCALES_KEY = "scales"


def find_study(source: str | Path) -> Path:
    """Return the file of a study, given its path or the name of a shipped study, with or without .yaml.

    Raises:
        UsageError: there is neither; the nearest shipped name is offered.
    """
    path = Path(source)
    # Includes common.yaml, which is the base of studies and no study itself.
    shipped = recipe_folder() / "studies" / f"{str(source).removesuffix('.yaml')}.yaml"
    for file in (path, shipped):
        if file.is_file():
            return file
    raise UsageError(f"there is no study {str(source)!r}: {suggest(path.stem, shipped_studies())}")


def load_study(source: str | Path, overrides: Sequence[str] = (), *, scale: str = "small") -> Study:
    """Read and check a study.

    Args:
        source: a file, or the name of a shipped study.
        overrides: `key.sub=value` texts, as on the command line; a value of null removes the key.
        scale: one of the scales of the study; its keys change the rest of the file.

    Raises:
        UsageError: there is no such study or scale, or the file is not a mapping.
        RecipeError: the study is wrong; the error lists every mistake with its place.
    """
    root = drop_deleted(_at_scale(read_layers(source, find=find_study), scale, source=str(source)))
    problems = [problem for text in overrides if (problem := _apply_override(root, text))]
    data = root.plain()
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        problems += [Problem(dotted(place), text, root.line_of(place)) for place, text in explain(error, Study, data)]
    else:
        problems += [Problem(dotted(place), text, root.line_of(place)) for place, text in wrong_references(study)]
        if not problems:
            return study
    raise RecipeError(str(find_study(source)), sorted(problems, key=lambda problem: problem.line or 0))


def dump_json(study: Study) -> str:
    """Return the study with every key written out, as JSON, which is also YAML."""
    return json.dumps(study.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def _at_scale(root: YamlNode, scale: str, *, source: str) -> YamlNode:
    """Return the tree without its scales, changed by one of them; a scale that is not a mapping changes nothing."""
    assert root.children is not None
    scales = root.children.pop(_SCALES_KEY, None)
    known = dict(scales.children or {}) if scales else {}
    if scale in known:
        return merge(root, mark_nulls(known[scale])) if known[scale].children is not None else root
    if known or scale not in SCALE_NAMES:
        raise UsageError(f"study {source} has no scale {scale!r}: {suggest(scale, map(str, known))}")
    return root


def _apply_override(root: YamlNode, text: str) -> Problem | None:
    """Apply `key.sub=value` to the tree in place, and return the mistake if there is one."""
    path, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not path:
        return Problem(text, "not a change: write key=value, for instance budget.images=100")
    try:
        new = parse(value, line=None)
    except YamlError as error:
        return Problem(path, f"the value {value!r} is not YAML: {error.reason}")
    if new.children is None and new.scalar is None:
        return remove_key(root, path)
    node = root
    *parents, last = path.split(".")
    for part in parents:
        assert node.children is not None
        node = node.children.setdefault(part, YamlNode(None, children={}))
        if is_value(node):
            return no_keys(path, part)
    assert node.children is not None
    node.children[last] = new
    return None
