"""Pickles of whole models (`torch.save(model)`, processes that are spawned): Brevitas's injectors are made at run time.

A module of Brevitas holds the injector that made its quantizers, a class that `let()` derives from an importable one
and that pickle cannot find by name. It is pickled as its base class and its own dependencies.
"""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Mapping
from typing import Any

from brevitas.inject import ExtendedInjector


def _reduce(injector: Any) -> str | tuple[Any, ...]:
    module = sys.modules.get(injector.__module__)
    if getattr(module, injector.__qualname__, None) is injector:
        return injector.__qualname__
    (base,) = injector.__bases__
    inherited = base.__dependencies__
    own = {name: spec for name, spec in injector.__dependencies__.items() if inherited.get(name) is not spec}
    return _make, (base, own)


def _make(base: Any, own: Mapping[str, Any]) -> Any:
    injector = type(base)(base.__name__, (base,), {})
    injector.__dependencies__.update(own)
    return injector


def allow_pickling() -> None:
    """Let pickle take injectors, in this process."""
    # Injectors are classes; the type of these classes has no public name.
    metaclass: Any = type(ExtendedInjector)
    copyreg.pickle(metaclass, _reduce)
