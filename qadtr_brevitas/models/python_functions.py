"""Networks that a function or class of any Python package makes, by the name "package.module:function"."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from qadtr_brevitas.core.errors import UsageError, suggest

_NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")
# Schemes of timm that are Python identifiers too; `hf-hub` and `local-dir` are none.
_TIMM_SCHEMES = ("timm", "hf_hub")


def is_function_name(name: str) -> bool:
    """Return whether a name has the form "package.module:function" and does not begin with a scheme of timm."""
    match = _NAME.fullmatch(name)
    return match is not None and match[1] not in _TIMM_SCHEMES


def find_function(name: str) -> Callable[..., Any]:
    """Import the module of a name "package.module:function" and return the function or class.

    The module is looked up among the installed packages, then in the current folder. Importing it runs its code.

    Raises:
        UsageError: the module cannot be imported, or it has no such function (the nearest name is offered).
    """
    match = _NAME.fullmatch(name)
    assert match is not None
    module, path = match.groups()
    found = _import(name, module)
    for part in path.split("."):
        if not hasattr(found, part):
            public = [other for other, value in vars(found).items() if callable(value) and not other.startswith("_")]
            raise UsageError(f"model {name!r}: {module!r} has no {part!r}; {suggest(part, public)}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"model {name!r} is {type(found).__name__}: name a function or class that makes a network")
    return found


def create_from_function(name: str, *, num_classes: int | None, args: Mapping[str, Any] | None = None) -> nn.Module:
    """Make the network of a name "package.module:function".

    Args:
        name: the name.
        num_classes: outputs, passed to a function that takes `num_classes`; None to leave that to the function.
        args: further keyword arguments of the function.

    Raises:
        UsageError: the function cannot be found, does not take the arguments, or returns no `torch.nn.Module`.
    """
    function = find_function(name)
    arguments = dict(args or {})
    if num_classes is not None and _takes(function, "num_classes"):
        arguments.setdefault("num_classes", num_classes)
    try:
        made = function(**arguments)
    except TypeError as error:
        raise UsageError(f"model {name!r} cannot be made: {error}; check model.args") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"model {name!r} returns {type(made).__name__}: it must return a torch.nn.Module")
    return made


def function_config(name: str) -> Mapping[str, Any]:
    """Return the `pretrained_cfg` of a function, or else of the network that it makes; empty if neither has one."""
    function = find_function(name)
    config = getattr(function, "pretrained_cfg", None)
    if config is None:
        config = getattr(create_from_function(name, num_classes=None), "pretrained_cfg", None)
    return config or {}


def _import(name: str, module: str) -> Any:
    here = os.getcwd()
    # Last, so that a file of the current folder never replaces a module of another package.
    if here not in sys.path:
        sys.path.append(here)
    try:
        return import_module(module)
    # The code of a module may raise anything.
    except Exception as error:
        reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise UsageError(
            f"model {name!r}: module {module!r} cannot be imported ({reason}); it is looked for among the installed "
            f"packages and in {here}"
        ) from error


def _takes(function: Callable[..., Any], keyword: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == keyword or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
