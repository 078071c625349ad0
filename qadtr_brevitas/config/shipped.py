"""The recipes that ship with the package, and how a recipe is found by name."""

from __future__ import annotations

import shutil
from pathlib import Path

from qadtr_brevitas.core.errors import UsageError, suggest

_PACKAGE = Path(__file__).parents[1]
_COMMON = "common"


def recipe_folder() -> Path:
    """Return the folder of the shipped recipes, in an installed package or at the top of a source checkout."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Return the file of every shipped recipe by name, sorted by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def shipped_defenses() -> dict[str, Path]:
    """Return the file of every shipped defense by name: changes to a recipe, given after it as RECIPE+DEFENSE."""
    return {path.stem: path for path in sorted((recipe_folder() / "defenses").glob("*.yaml"))}


def shipped_studies() -> dict[str, Path]:
    """Return the file of every shipped study by name, sorted by name, without their common base."""
    found = {path.stem: path for path in sorted((recipe_folder() / "studies").glob("*.yaml"))}
    return {name: path for name, path in found.items() if name != _COMMON}


def split_name(source: str | Path) -> list[str | Path]:
    """Return the recipe and the defenses of `RECIPE+DEFENSE`; the name of an existing file is not split."""
    return [source] if Path(source).is_file() else [*str(source).split("+")]


def find_defense(name: str | Path) -> Path:
    """Return the file of a defense that is given by path or by the name of a shipped one.

    Raises:
        UsageError: there is neither; the nearest shipped name is offered.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_defenses()
    if str(name) in shipped:
        return shipped[str(name)]
    raise UsageError(f"unknown defense {str(name)!r}: {suggest(str(name), shipped)}")


def find_recipe(source: str | Path) -> Path:
    """Return the file of a recipe that is given by path or by the name of a shipped one, with or without .yaml.

    Raises:
        UsageError: there is neither; the nearest shipped name is offered.
    """
    path = Path(source)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    name = str(source).removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        raise UsageError(f"{source} is a folder, not a recipe; give a YAML file or the name of a shipped recipe")
    if name in shipped_defenses():
        raise UsageError(f"{name} is a defense, not a recipe: add it to a recipe, as in cifar10_resnet20_qat+{name}")
    raise UsageError(f"unknown recipe {str(source)!r}: {suggest(path.stem, shipped)}")


def recipe_description(path: Path) -> str:
    """Return the first line of the comment at the start of a recipe, or an empty text."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = next(lines, "")
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def copy_recipe(name: str, target: Path, *, force: bool = False) -> Path:
    """Copy a recipe to a file, or into a folder under its own name, and return the path of the copy.

    The copy of RECIPE+DEFENSE is a recipe that names them as its base.

    Raises:
        UsageError: there is no such recipe, or the target exists and `force` is not set, or it cannot be written.
    """
    first, *defenses = split_name(name)
    source = find_recipe(first)
    for defense in defenses:
        find_defense(defense)
    if target.is_dir():
        target = target / (f"{name}.yaml" if defenses else source.name)
    if target.exists() and not force:
        raise UsageError(f"{target} already exists: choose another name, or overwrite it with --force")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if defenses:
            target.write_text(f"# {name}, with changes.\nbase: {name}\n", encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    except (OSError, shutil.SameFileError) as error:
        raise UsageError(f"cannot copy {source} to {target}: {error}; choose another target") from error
    return target
