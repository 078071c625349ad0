"""Optional packages, which the extras of this package install."""

from importlib import import_module
from types import ModuleType

from qadtr_brevitas.core.errors import UsageError


def require(module: str, *, extra: str | None, purpose: str) -> ModuleType:
    """Import and return a module of an optional package.

    Args:
        module: full name of the module, for instance `qonnx.core.modelwrapper`.
        extra: the extra of this package that installs it; None for what comes with this package.
        purpose: what needs it, as the subject of the error message.

    Raises:
        UsageError: the package is not installed, or one that it needs is missing.
    """
    try:
        return import_module(module)
    except ImportError as error:
        # The package itself, or one that it imports.
        package = (error.name or module).partition(".")[0]
        install = package.replace("_", "-") if extra is None else f"'qadtr-brevitas[{extra}]'"
        raise UsageError(f"{purpose} needs {package} ({error}): pip install {install}") from error
