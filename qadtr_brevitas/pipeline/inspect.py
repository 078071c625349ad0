"""Facts about a file or folder that this package wrote, from its JSON and metadata alone: no tensors, no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, cast

from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.core.files import read_json, recover_directory
from qadtr_brevitas.pipeline.directories import (
    ANALYSIS_FILE,
    CONFIG_FILE,
    EXPORT_REPORT_FILE,
    METRICS_FILE,
    MODEL_FOLDERS,
    PATCH_SUFFIX,
    RECIPE_FILE,
    REPORT_FILE,
    STATE_FOLDER,
    STUDY_FILE,
    WEIGHTS_FILE,
    Kind,
    is_patch,
    models_of_run,
    patch_files,
    read_header,
    what_is,
)

_NOT_SHOWN = ("classes",)
_STUDY_FACTS = ("title", "paper", "scale", "command", "reports", "analyses")
_ANALYSIS_FACTS = ("analysis", "title", "created", "command", "seed", "device", "settings")
_REPORT_FACTS = ("schema_version", "created", "command", "seed", "device")


def describe(path: Path) -> dict[str, Any]:
    """Return facts about a model, run, patch, report, study, analysis, export or weights; `kind` names which it is.

    Raises:
        UsageError: there is no such path, or it is none of these.
        CheckpointError: it is damaged.
    """
    recover_directory(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a model, run, patch or report that a command wrote")
    kind = what_is(path)
    if kind is None:
        raise _unknown(path)
    return {"kind": str(kind), "path": str(path), **_FACTS[kind](path)}


def _unknown(path: Path) -> UsageError:
    if not path.is_dir():
        return UsageError(
            f"{path} is not a model, run, patch or report; give a folder, a {PATCH_SUFFIX} or a {REPORT_FILE}"
        )
    return UsageError(
        f"{path} holds no model, run, patch, report, study, analysis or export; give the folder that a command named "
        "at its end"
    )


def _model(path: Path) -> dict[str, Any]:
    config = _read_mapping(path / CONFIG_FILE)
    facts = {key: value for key, value in config.items() if key not in _NOT_SHOWN}
    return {**facts, **_weights(path / WEIGHTS_FILE)}


def _run(path: Path) -> dict[str, Any]:
    for name in MODEL_FOLDERS:
        recover_directory(path / name)
    models = models_of_run(path)
    facts: dict[str, Any] = {
        "recipe": str(path / RECIPE_FILE),
        "models": [folder.name for folder in models],
        "can be resumed": (path / STATE_FOLDER).exists(),
    }
    if left := epochs_left(path):
        facts["epochs"] = "{} of {}".format(*left)
    metrics = path / METRICS_FILE
    if metrics.exists():
        facts["last metrics"] = _last_record(metrics)
    if models:
        facts["model"] = describe(models[0])
    return facts


def _study(path: Path) -> dict[str, Any]:
    study = _read_mapping(path / STUDY_FILE)
    return {key: study.get(key) for key in _STUDY_FACTS}


def _analysis(path: Path) -> dict[str, Any]:
    analysis = _read_mapping(path / ANALYSIS_FILE)
    return {key: analysis.get(key) for key in _ANALYSIS_FACTS}


def _report(path: Path) -> dict[str, Any]:
    file = path / REPORT_FILE if path.is_dir() else path
    report = _read_mapping(file)
    if "schema_version" not in report or "cells" not in report:
        raise UsageError(f"{file} is not a report; give the {REPORT_FILE} that `qadtr-brevitas evaluate` wrote")
    counts = {f"number of {key}": len(report.get(key) or ()) for key in ("models", "patches", "attacks", "cells")}
    return {"path": str(file), **{key: report.get(key) for key in _REPORT_FACTS}, **counts}


def _export(path: Path) -> dict[str, Any]:
    return _read_mapping(path / EXPORT_REPORT_FILE)


def _patches(path: Path) -> dict[str, Any]:
    return {"patches": [file.name for file in patch_files(path) if is_patch(file)]}


def _patch(path: Path) -> dict[str, Any]:
    metadata, shapes = read_header(path)
    try:
        meta, place = json.loads(metadata["meta"]), json.loads(metadata["place"])
        return {"size": shapes["mask"], "place": place, **meta}
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); make the patch again") from error


def _weights(path: Path) -> dict[str, Any]:
    _, shapes = read_header(path)
    return {"tensors": len(shapes), "numbers": sum(map(prod, shapes.values())), "bytes": path.stat().st_size}


_FACTS = {
    Kind.MODEL: _model,
    Kind.RUN: _run,
    Kind.STUDY: _study,
    Kind.ANALYSIS: _analysis,
    Kind.REPORT: _report,
    Kind.EXPORT: _export,
    Kind.PATCHES: _patches,
    Kind.PATCH: _patch,
    Kind.WEIGHTS: _weights,
}


def _read_mapping(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it is not a mapping; write it again")
    return cast("dict[str, Any]", content)


def epochs_left(run: Path) -> tuple[int, int] | None:
    """Return the epochs that a run has done and those of its recipe; None if it is finished or does not tell.

    Args:
        run: a run directory.
    """
    # Help and completion do without.
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        train = YAML(typ="safe").load(run / RECIPE_FILE)["train"]
        planned = int(train["float_epochs"]) + int(train["epochs"])
    except (OSError, YAMLError, LookupError, TypeError, ValueError):
        return None
    last = _last_record(run / METRICS_FILE, kinds=("epoch", "final"))
    done = last["epoch"] + 1 if last else 0
    return (done, planned) if done < planned else None


def _last_record(path: Path, *, kinds: Sequence[str] = ()) -> Any:
    """Return the last complete record, of some kinds if given; a run that was killed may have left half a line."""
    if not path.is_file():
        return None
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not kinds or record.get("kind") in kinds:
            return record
    return None
