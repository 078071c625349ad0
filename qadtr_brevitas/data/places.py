"""Where data and caches lie."""

import os
from pathlib import Path

DATA_VARIABLE = "QADTR_BREVITAS_DATA"


def data_folder() -> Path | None:
    """The folder that the environment variable QADTR_BREVITAS_DATA names, or None where it is not set."""
    value = os.environ.get(DATA_VARIABLE)
    return Path(value).expanduser() if value else None


def cache_folder() -> Path:
    """The folder for what can be made again at any time: $XDG_CACHE_HOME (or ~/.cache) + /qadtr_brevitas."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "qadtr_brevitas"
