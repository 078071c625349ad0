"""YAML as a tree that knows the line of every key, so that errors can name it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from qadtr_brevitas.config.problems import KeyPath
from qadtr_brevitas.core.errors import Problem, RecipeError, UsageError


@dataclass
class YamlNode:
    """A value in a YAML file.

    Args:
        line: 1-based line of its key in the file, None for one given on the command line.
        scalar: the value, where it is neither a mapping nor a list.
        children: its members by key, or by index where `is_list`.
        deletes: whether it is a null that deletes the key of a lower layer.
    """

    line: int | None
    scalar: Any = None
    children: dict[int | str, YamlNode] | None = None
    is_list: bool = False
    deletes: bool = False

    def plain(self) -> Any:
        """Return the value as dicts, lists and scalars."""
        if self.children is None:
            return self.scalar
        if self.is_list:
            return [child.plain() for child in self.children.values()]
        return {key: child.plain() for key, child in self.children.items()}

    def line_of(self, place: KeyPath) -> int | None:
        """Return the line of a key, or of the nearest key around it that is in the file."""
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


def read_source(path: Path) -> YamlNode:
    """Read a recipe file.

    Raises:
        UsageError: the file cannot be read, is empty, is not text, or is not a mapping.
        RecipeError: it is not YAML, or has a key twice.
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


def parse_value(text: str) -> YamlNode:
    """Parse the value of a key=value: YAML, but paths and texts with a ` #` are taken whole, as they were typed.

    Raises:
        YamlError: the text is not YAML, or has a key twice.
    """
    is_path = text.startswith(("/", "./", "../", "~/"))
    # In a file, a `#` after a space begins a comment; nobody comments on the command line.
    has_mark = " #" in text and text.lstrip()[0] not in "\"'[{&*!|>"
    return YamlNode(None, scalar=text) if is_path or has_mark else parse(text, line=None)


def parse(text: str, *, line: int | None = 1) -> YamlNode:
    """Parse YAML 1.2; the lines of the tree are all None if `line` is None.

    Raises:
        YamlError: the text is not YAML, or has a key twice.
    """
    try:
        value = YAML(typ="rt", pure=True).load(text)
        return _node(value, line)
    except DuplicateKeyError as error:
        mark = error.problem_mark
        key = str(error.problem).partition('"')[2].partition('"')[0]
        raise YamlError(f"key {key!r} is given twice: remove one of them", mark.line + 1 if mark else None) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        reason = ": ".join(filter(None, (error.context, error.problem)))
        raise YamlError(reason, mark.line + 1 if mark else None) from error
    except (YAMLError, ValueError) as error:
        raise YamlError(str(error).splitlines()[0]) from error
    except RecursionError as error:
        raise YamlError("it is nested too deeply") from error


def _node(value: Any, line: int | None) -> YamlNode:
    if isinstance(value, CommentedMap):
        pairs = {str(key): _node(item, _line(value, key, line)) for key, item in cast("dict[Any, Any]", value).items()}
        return YamlNode(line, children=cast("dict[int | str, YamlNode]", pairs))
    if isinstance(value, CommentedSeq):
        items = cast("list[Any]", value)
        return YamlNode(
            line, children={i: _node(item, _line(value, i, line)) for i, item in enumerate(items)}, is_list=True
        )
    return YamlNode(line, scalar=_scalar(value))


def _line(parent: CommentedMap | CommentedSeq, key: Any, line: int | None) -> int | None:
    if line is None:
        return None
    # A key merged in with << has no line of its own.
    places = parent.lc.data or {}
    return places[key][0] + 1 if key in places else line


def _scalar(value: Any) -> Any:
    """Return the plain value that one of ruamel's round-trip scalars stands for."""
    if isinstance(value, TaggedScalar):
        return str(value.value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value
