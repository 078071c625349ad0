"""Recipe text as a tree that knows the line of every key, so that errors can name it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from qadtr_brevitas.config.problems import Location
from qadtr_brevitas.core.errors import Problem, RecipeError, UsageError


@dataclass
class Node:
    """A value of a recipe.

    Args:
        line: 1-based line of its key in the file, None for one given on the command line.
        scalar: the value, where it is neither a mapping nor a list.
        children: its members by key, or by index where `is_list`.
        takes_out: a null that takes out what a lower layer says.
    """

    line: int | None
    scalar: Any = None
    children: dict[int | str, Node] | None = None
    is_list: bool = False
    removes: bool = False

    def plain(self) -> Any:
        """The value as dicts, lists and scalars."""
        if self.children is None:
            return self.scalar
        if self.is_list:
            return [child.plain() for child in self.children.values()]
        return {key: child.plain() for key, child in self.children.items()}

    def line_of(self, place: Location) -> int | None:
        """The line of a place, or of the nearest key around it that was written down."""
        node = self
        for part in place:
            below = (node.children or {}).get(part)
            if below is None:
                break
            node = below
        return node.line


@dataclass(frozen=True)
class YamlError(Exception):
    """Text that is not YAML: the reason and, where known, the line."""

    reason: str
    line: int | None = field(default=None)


def read_source(path: Path) -> Node:
    """Reads a recipe file.

    Raises:
        UsageError: it cannot be read, or is empty, or is no text, or is not a mapping.
        RecipeError: it is not YAML, or a key is there twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a text file; a recipe is YAML, see: qadtr-brevitas recipes list") from None
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    try:
        node = parse(text)
    except YamlError as error:
        raise RecipeError(str(path), [Problem("not valid YAML", error.reason, error.line or 1)]) from error
    if node.children is None or node.is_list:
        what = "is empty" if node.scalar is None and not node.is_list else "is not a mapping of keys to values"
        raise UsageError(f"the recipe {path} {what}; start from a copy: qadtr-brevitas recipes copy NAME FILE")
    return node


def parse(text: str, *, line: int | None = 1) -> Node:
    """Reads YAML 1.2; the tree's lines are all None where `line` is None.

    Raises:
        YamlError: the text is not YAML, or a key is there twice.
    """
    try:
        value = YAML(typ="rt", pure=True).load(text)
        return _node(value, line)
    except DuplicateKeyError as error:
        mark = error.problem_mark
        key = str(error.problem).partition('"')[2].partition('"')[0]
        raise YamlError(f"key {key!r} is there twice; remove one", mark.line + 1 if mark else None) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        reason = ": ".join(filter(None, (error.context, error.problem)))
        raise YamlError(reason, mark.line + 1 if mark else None) from error
    except (YAMLError, ValueError) as error:
        raise YamlError(str(error).splitlines()[0]) from error
    except RecursionError as error:
        raise YamlError("it is nested too deeply") from error


def _node(value: Any, line: int | None) -> Node:
    if isinstance(value, CommentedMap):
        pairs = {str(key): _node(item, _line(value, key, line)) for key, item in cast("dict[Any, Any]", value).items()}
        return Node(line, children=cast("dict[int | str, Node]", pairs))
    if isinstance(value, CommentedSeq):
        items = cast("list[Any]", value)
        return Node(
            line, children={i: _node(item, _line(value, i, line)) for i, item in enumerate(items)}, is_list=True
        )
    return Node(line, scalar=_scalar(value))


def _line(parent: CommentedMap | CommentedSeq, key: Any, line: int | None) -> int | None:
    if line is None:
        return None
    # A key merged in with << has no place of its own.
    places = parent.lc.data or {}
    return places[key][0] + 1 if key in places else line


def _scalar(value: Any) -> Any:
    """The plain types that ruamel's round-trip scalars stand for."""
    if isinstance(value, TaggedScalar):
        return str(value.value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value
