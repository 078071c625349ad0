"""The libraries that exports need, which are an extra."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qadtr_brevitas.errors import UsageError


def library(name: str) -> Any:
    """Imports a module of an optional library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UsageError(
            f"exports need {package}, which is not installed or not complete ({error}): "
            "pip install qadtr-brevitas[export]"
        ) from error
