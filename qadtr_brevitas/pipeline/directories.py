"""The files that commands write and read: their names, and what a given folder holds.

- Model directory: weights and config. It is all that is needed to have a switchable model again.
- Run directory: the recipe, metrics and training state of a run, with the model directories `last` and `best` in it.
- Patch folder: patch files, by default `patches` in the directory of the model they were made on.
- Report folder: one evaluation, with its audit and the finished cells that a later evaluation reuses.
- Analysis, study and export folders: one result each.

This module loads nothing heavy, so that the command line can look around before it imports torch.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.core.files import check_replaceable, read_json

# Model directory
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

# Run directory
RECIPE_FILE, METRICS_FILE = "recipe.yaml", "metrics.jsonl"
STATE_FOLDER, TENSORBOARD_FOLDER = "state", "tensorboard"
STATE_FILE = f"{STATE_FOLDER}/training.pt"
LAST_FOLDER, BEST_FOLDER = "last", "best"
MODEL_FOLDERS = (LAST_FOLDER, BEST_FOLDER)

# What other commands write into the directory of a model by default
PATCH_FOLDER, EVALUATION_FOLDER, ANALYSIS_FOLDER = "patches", "evaluation", "analysis"
PATCH_SUFFIX = ".safetensors"
PATCH_FORMAT = "qadtr_brevitas.patch"
"""What the metadata of a patch file name as its format."""

# Report folder
REPORT_FILE, REPORT_TEXT_FILE = "report.json", "report.md"
CELLS_CSV_FILE, WORST_CASE_FILE, CERTIFIED_FILE = "cells.csv", "worst_case.csv", "certified.csv"
PICTURE_PATTERNS = ("asr.png", "certified.png", "patches.png", "examples-*.png")
AUDIT_FILE = "audit.json"
CELL_FOLDER, AUDIT_FOLDER = "cells", "audit"

# Analysis folder
ANALYSIS_FILE, RECORDS_FILE = "analysis.json", "records.csv"

# Study folder
STUDY_FILE, STUDY_SETTINGS_FILE, STUDY_TEXT_FILE = "study.json", "study.yaml", "study.md"
STUDY_VALUES_FILE, PAGE_FILE = "figures.csv", "report.html"

# Export folder
ONNX_FILE, EXPORT_REPORT_FILE = "model.onnx", "export-report.json"
# The field of an export's report that names the files of the folder.
EXPORTED_FILES = "files"


class Kind(StrEnum):
    """What a file or folder is."""

    MODEL = "model"
    RUN = "run"
    STUDY = "study"
    ANALYSIS = "analysis"
    REPORT = "report"
    EXPORT = "export"
    PATCHES = "folder of patches"
    PATCH = "patch"
    WEIGHTS = "weights"


# The first file that is there decides: an analysis may hold the report of an evaluation too.
_FOLDERS = {
    WEIGHTS_FILE: Kind.MODEL,
    RECIPE_FILE: Kind.RUN,
    STUDY_FILE: Kind.STUDY,
    ANALYSIS_FILE: Kind.ANALYSIS,
    REPORT_FILE: Kind.REPORT,
    EXPORT_REPORT_FILE: Kind.EXPORT,
}


def what_is(path: Path) -> Kind | None:
    """Return what a file or folder is, or None if this package writes and reads nothing of that kind.

    Raises:
        CheckpointError: a `.safetensors` file is damaged.
    """
    if path.is_dir():
        named = next((kind for name, kind in _FOLDERS.items() if (path / name).exists()), None)
        return named or (Kind.PATCHES if any(map(is_patch, patch_files(path))) else None)
    if path.suffix == PATCH_SUFFIX and path.is_file():
        return Kind.PATCH if is_patch(path) else Kind.WEIGHTS
    return Kind.REPORT if path.suffix == ".json" and path.is_file() else None


def is_model_dir(path: Path) -> bool:
    """Return whether a folder itself holds a model, complete or not."""
    return (path / WEIGHTS_FILE).is_file() or (path / CONFIG_FILE).is_file()


def resolve_model_dir(path: str | Path) -> Path:
    """Return a model directory as it is given, or `last` of a run directory.

    Raises:
        CheckpointError: neither is there, or one of the two files of a model is missing.
    """
    given = Path(path).expanduser()
    for folder in (given, given / LAST_FOLDER):
        found = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if (folder / name).is_file()]
        if len(found) == 2:
            return folder
        if found:
            missing = CONFIG_FILE if found == [WEIGHTS_FILE] else WEIGHTS_FILE
            raise CheckpointError(f"{folder} has a {found[0]} but no {missing}: copy both files of the model")
    raise CheckpointError(
        f"there is no model in {given}: give a run or model directory, or make one with `qadtr-brevitas train RECIPE`"
    )


def models_of_run(run: Path) -> list[Path]:
    """Return the model directories in a run directory, the last model first."""
    return [run / name for name in MODEL_FOLDERS if (run / name / WEIGHTS_FILE).is_file()]


def recipe_of_model(path: Path) -> Path | None:
    """Return the recipe file of a run directory, or of the run that `last` or `best` belongs to; None without one."""
    candidates = (path / RECIPE_FILE, path.resolve().parent / RECIPE_FILE)
    return next((file for file in candidates if file.is_file()), None)


def patch_folder(model_dir: Path) -> Path:
    """Return where the patches made on a model are; for `last` of a run, which is the run's model, those of the run."""
    own, folder = model_dir / PATCH_FOLDER, model_dir.resolve()
    return folder.parent / PATCH_FOLDER if folder.name == LAST_FOLDER and not own.is_dir() else own


def patch_files(folder: Path) -> list[Path]:
    """Return the files of a folder that may be patches, sorted by name."""
    return sorted(folder.glob(f"*{PATCH_SUFFIX}"))


def is_patch(file: Path) -> bool:
    """Return whether a `.safetensors` file is a patch.

    Raises:
        CheckpointError: the file is damaged.
    """
    return read_header(file)[0].get("format") == PATCH_FORMAT


def read_header(file: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Return the metadata of a `.safetensors` file and the shapes of its tensors, without reading the tensors.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; check the path")
    try:
        with safe_open(file, framework="np") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
            return opened.metadata() or {}, shapes
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file ({error}): make or download it again"
        ) from error


def name_of_model(model: str | Path) -> str:
    """Return the last part of a model's name or path; `last` of a run is called like the run, `best` RUN-best."""
    path = Path(model).resolve() if Path(model).is_dir() else Path(model)
    of_run = {LAST_FOLDER: path.parent.name, BEST_FOLDER: f"{path.parent.name}-{BEST_FOLDER}"}
    # Of "package.module:function" and "hf-hub:owner/name", the part behind the colon.
    return of_run.get(path.name, path.name.rpartition(":")[2])


def check_export_output(output: Path, *, overwrite: bool, option: str = "--overwrite", choose: str = "with -o") -> None:
    """Refuse to write an export where something is that no export wrote, or one that is not to be replaced.

    Args:
        output: the folder to write.
        overwrite: whether an export that is there is replaced.
        option: what the user gives to replace it.
        choose: how another folder is chosen.

    Raises:
        UsageError: the folder is there and is kept.
    """
    another = f"choose another folder {choose}".rstrip()
    if output.exists() and not overwrite:
        raise UsageError(f"{output} is there already: {another}, or replace it with {option}")
    report = output / EXPORT_REPORT_FILE
    written = read_json(report).get(EXPORTED_FILES, []) if report.is_file() else []
    check_replaceable(output, [*written, EXPORT_REPORT_FILE], advice=another)


def check_model_output(output: Path, *, advice: str) -> None:
    """Refuse to replace a folder that holds more than a model, such as its patches.

    Raises:
        UsageError: something else is there.
    """
    check_replaceable(output, (WEIGHTS_FILE, CONFIG_FILE), advice=advice)
