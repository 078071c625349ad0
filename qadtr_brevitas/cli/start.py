"""What a command does before its heavy imports: look whether its paths are there, and say that it has started."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from qadtr_brevitas.cli.common import is_quiet, stderr, warn
from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.core.registry import DATASETS
from qadtr_brevitas.pipeline.directories import recipe_of_model, resolve_model_dir
from qadtr_brevitas.pipeline.inspect import epochs_left

_EMBEDDED = ("digits", "shapes")


def check_models(paths: Sequence[Path]) -> None:
    """Raise if one of the folders holds no model, and warn of models whose training is not finished.

    Raises:
        CheckpointError: as in `resolve_model_dir`.
    """
    for path in paths:
        resolve_model_dir(path)
    for path in dict.fromkeys(paths):
        recipe = recipe_of_model(path)
        if recipe is not None and (left := epochs_left(recipe.parent)):
            done, planned = left
            warn(
                f"the training of {path} is not finished (epoch {done} of {planned}), so figures are of a network that "
                "will change: resume it with the command that began it"
            )


def check_data(choice: str | None, *, option: str = "--data") -> None:
    """Raise if a data set chosen as NAME:ROOT is unknown or its folder is not there; others are not looked at.

    Raises:
        UsageError: there is no data set of that name.
        DataError: there is no such folder or archive.
    """
    if choice is None or choice.lstrip().startswith("{"):
        return
    name, _, root = choice.partition(":")
    DATASETS.describe(name)
    # These make their images themselves, and have an error of their own for a folder.
    if name in _EMBEDDED:
        return
    if root and not Path(root).expanduser().exists():
        raise DataError(f"there is no folder {root}: give one with images as {option} {name}:FOLDER")


def load_libraries() -> None:
    """Import PyTorch, timm and Brevitas, which takes seconds, with a word about it on a terminal."""
    if "torch" in sys.modules:
        return
    console = stderr()
    if is_quiet() or not console.is_terminal:
        return
    with console.status("loading PyTorch, timm and Brevitas"):
        import_module("qadtr_brevitas.pipeline.build")
