"""What a file or folder made by this package is, told from its JSON and metadata alone: no tensors, no torch."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any, cast

from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.core.files import read_json, recover_directory

_LARGEST_HEADER = 100_000_000
_NOT_SHOWN = ("classes",)
_EXPORT_REPORT = "export-report.json"
_STUDY, _ANALYSIS = "study.json", "analysis.json"
_STUDY_FACTS = ("title", "paper", "scale", "command", "reports", "analyses")
_ANALYSIS_FACTS = ("analysis", "title", "created", "command", "seed", "device", "settings")


def describe(path: Path) -> dict[str, Any]:
    """Facts about a model directory, run, patch, report, study, analysis, export or weights; `kind` says which it is.

    Raises:
        UsageError: there is no such path, or it is none of these.
        CheckpointError: it is damaged.
    """
    recover_directory(path)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise UsageError(f"there is no {path}; give a model, run, patch or report that a command wrote")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix == ".json":
        return _report(path)
    raise UsageError(f"{path} is not a model, run, patch or report; give a folder, a .safetensors or a report.json")


def _folder(path: Path) -> dict[str, Any]:
    if (path / "model.safetensors").exists():
        return _model(path)
    if (path / "recipe.yaml").exists():
        return _run(path)
    if (path / _STUDY).exists():
        study = _mapping(path / _STUDY)
        return {"kind": "study", "path": str(path), **{key: study.get(key) for key in _STUDY_FACTS}}
    if (path / _ANALYSIS).exists():
        analysis = _mapping(path / _ANALYSIS)
        return {"kind": "analysis", "path": str(path), **{key: analysis.get(key) for key in _ANALYSIS_FACTS}}
    if (path / "report.json").exists():
        return _report(path / "report.json")
    if (path / _EXPORT_REPORT).exists():
        return {"kind": "export", "path": str(path), **_mapping(path / _EXPORT_REPORT)}
    patches = [file for file in sorted(path.glob("*.safetensors")) if _header(file)[0].get("meta")]
    if patches:
        return {"kind": "folder of patches", "path": str(path), "patches": [file.name for file in patches]}
    raise UsageError(
        f"{path} holds no model, run, patch, report, study, analysis or export; give the folder that a command named "
        "at its end"
    )


def _model(path: Path) -> dict[str, Any]:
    config = _mapping(path / "config.json")
    _, tensors = _header(path / "model.safetensors")
    facts = {key: value for key, value in config.items() if key not in _NOT_SHOWN}
    return {"kind": "model", "path": str(path), **facts, **_sizes(path / "model.safetensors", tensors)}


def _run(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": "run", "path": str(path), "recipe": str(path / "recipe.yaml")}
    for name in ("last", "best"):
        recover_directory(path / name)
    facts["models"] = [name for name in ("last", "best") if (path / name / "model.safetensors").exists()]
    facts["can be resumed"] = (path / "state").exists()
    metrics = path / "metrics.jsonl"
    if metrics.exists():
        facts["last metrics"] = _last_line(metrics)
    if facts["models"]:
        facts["model"] = _model(path / facts["models"][0])
    return facts


def _report(path: Path) -> dict[str, Any]:
    report = _mapping(path)
    if "schema_version" not in report or "cells" not in report:
        raise UsageError(f"{path} is not a report; give the report.json that `qadtr-brevitas evaluate` wrote")
    facts = {key: report.get(key) for key in ("schema_version", "created", "command", "seed", "device")}
    counts = {f"number of {key}": len(report.get(key) or ()) for key in ("models", "patches", "attacks", "cells")}
    return {"kind": "report", "path": str(path), **facts, **counts}


def _safetensors(path: Path) -> dict[str, Any]:
    metadata, tensors = _header(path)
    if metadata.get("format") != "qadtr_brevitas.patch":
        return {"kind": "weights", "path": str(path), **_sizes(path, tensors)}
    try:
        meta, place = json.loads(metadata["meta"]), json.loads(metadata["place"])
        size = tensors["mask"]["shape"]
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); make the patch again") from error
    return {"kind": "patch", "path": str(path), "size": size, "place": place, **meta}


def _header(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The metadata and the shapes of a safetensors file, checked against its length."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length < _LARGEST_HEADER else None
        if not isinstance(header, dict):
            raise ValueError("it has no header")
        tensors = cast("dict[str, Any]", header)
        metadata = tensors.pop("__metadata__", {})
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        if path.stat().st_size != 8 + length + end:
            raise ValueError("it is cut off")
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}; check the path") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); make or download it again") from error
    return metadata, tensors


def _sizes(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    numbers = sum(prod(tensor["shape"]) for tensor in tensors.values())
    return {"tensors": len(tensors), "numbers": numbers, "bytes": path.stat().st_size}


def _mapping(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no mapping; write it again")
    return cast("dict[str, Any]", content)


def _last_line(path: Path) -> Any:
    """The last whole record; a run that was killed may have left half a line."""
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return None
