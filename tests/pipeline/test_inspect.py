from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.core.files import write_json
from qadtr_brevitas.pipeline.inspect import describe, epochs_left


def model_directory(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, folder / "model.safetensors")
    write_json(folder / "config.json", {"name": "toy", "num_classes": 2, "classes": ["cat", "dog"]})
    return folder


def run_directory(folder: Path) -> Path:
    model_directory(folder / "last")
    (folder / "recipe.yaml").write_text("seed: 1\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    return folder


def test_a_model(tmp_path: Path) -> None:
    facts = describe(model_directory(tmp_path / "model"))
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert facts.pop("path") == str(tmp_path / "model")
    assert facts == {"kind": "model", "name": "toy", "num_classes": 2, "tensors": 2, "numbers": 10, "bytes": size}


def test_an_export(tmp_path: Path) -> None:
    write_json(tmp_path / "export-report.json", {"format": "qonnx", "precision": "4", "agreement": None})
    assert describe(tmp_path) == {
        "kind": "export",
        "path": str(tmp_path),
        "format": "qonnx",
        "precision": "4",
        "agreement": None,
    }


def test_a_run_and_its_last_whole_record(tmp_path: Path) -> None:
    facts = describe(run_directory(tmp_path / "run"))
    assert facts["kind"] == "run"
    assert facts["models"] == ["last"]
    assert facts["last metrics"] == {"step": 2}
    assert facts["can be resumed"] is False
    assert facts["model"]["name"] == "toy"


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    (tmp_path / "metrics.jsonl").write_text("")
    facts = describe(tmp_path)
    assert facts["models"] == []
    assert facts["last metrics"] is None


@pytest.mark.parametrize(("records", "left"), [("", (0, 3)), ('{"kind": "epoch", "epoch": 1}\n', (2, 3))])
def test_epochs_left_of_a_run(tmp_path: Path, records: str, left: tuple[int, int]) -> None:
    run = run_directory(tmp_path / "run")
    (run / "recipe.yaml").write_text("train:\n  float_epochs: 1\n  epochs: 2\n")
    # A step of the next epoch is no epoch, and a killed run may leave half a line.
    (run / "metrics.jsonl").write_text(records + '{"kind": "step", "epoch": 2}\n{"kind": "ep')
    assert epochs_left(run) == left
    assert describe(run)["epochs"] == "{} of {}".format(*left)


@pytest.mark.parametrize(
    "recipe", ["train: {float_epochs: 1, epochs: 2}", "seed: 1", "train: [", "train: {epochs: x}", ""]
)
def test_a_run_that_is_finished_or_does_not_tell_has_no_epochs_left(tmp_path: Path, recipe: str) -> None:
    run = run_directory(tmp_path / "run")
    (run / "recipe.yaml").write_text(recipe)
    (run / "metrics.jsonl").write_text('{"kind": "epoch", "epoch": 2}\n{"kind": "final", "epoch": 2}\n')
    assert epochs_left(run) is None
    assert "epochs" not in describe(run)


def test_a_model_directory_caught_between_two_renames(tmp_path: Path) -> None:
    model_directory(tmp_path / ".last.old")
    assert describe(tmp_path / "last")["kind"] == "model"


def test_a_patch_and_a_folder_of_them(tmp_path: Path) -> None:
    patch = Patch(texture=torch.zeros(3, 2, 4), mask=torch.ones(2, 4, dtype=torch.bool), meta={"attack": "lavan"})
    file = patch.save(tmp_path / "toy")
    facts = describe(file)
    assert (facts["kind"], facts["size"], facts["place"], facts["attack"]) == ("patch", [2, 4], "random", "lavan")
    assert describe(tmp_path)["patches"] == ["toy.safetensors"]


def test_a_report(tmp_path: Path) -> None:
    write_json(
        tmp_path / "report.json", {"schema_version": 1, "seed": 3, "cells": [1, 2], "models": [], "patches": [1]}
    )
    for path in (tmp_path, tmp_path / "report.json"):
        facts = describe(path)
        assert (facts["kind"], facts["seed"], facts["number of cells"]) == ("report", 3, 2)


def test_plain_weights(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(5)}, tmp_path / "a.safetensors")
    facts = describe(tmp_path / "a.safetensors")
    assert (facts["kind"], facts["tensors"], facts["numbers"]) == ("weights", 1, 5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: b"\x80\x04\x95pickled",
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: b"\x02" + bytes(7) + b"[]",
    ],
)
def test_damaged_weights(tmp_path: Path, damage) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(5)}, file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        describe(file)


def test_damaged_facts(tmp_path: Path) -> None:
    folder = model_directory(tmp_path / "model")
    write_json(folder / "config.json", [1])
    with pytest.raises(CheckpointError, match="is not a mapping"):
        describe(folder)
    os.remove(folder / "config.json")
    with pytest.raises(CheckpointError, match="does not exist"):
        describe(folder)
    tensors = {"texture": torch.zeros(3, 2, 2), "mask": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "p.safetensors", metadata={"format": "qadtr_brevitas.patch", "meta": "{"})
    with pytest.raises(CheckpointError, match="make the patch again"):
        describe(tmp_path / "p.safetensors")


def test_things_that_are_none_of_these(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    for path, words in [
        (tmp_path / "missing", "missing"),
        (tmp_path / "a.txt", "is not a model, run, patch or report"),
        (tmp_path / "a.json", "is not a report"),
        (tmp_path, "holds no model, run, patch, report, study, analysis or export"),
    ]:
        with pytest.raises(UsageError, match=words):
            describe(path)


def test_studies_and_analyses_say_what_they_are_of(tmp_path: Path) -> None:
    write_json(tmp_path / "study" / "study.json", {"title": "Defenses", "paper": "table11", "rows": {}})
    # An analysis may hold the report of an evaluation too.
    write_json(tmp_path / "size" / "analysis.json", {"analysis": "size", "seed": 3, "records": []})
    write_json(tmp_path / "size" / "report.json", {})
    study, size = describe(tmp_path / "study"), describe(tmp_path / "size")
    assert (study["kind"], study["paper"], study["scale"]) == ("study", "table11", None)
    assert (size["kind"], size["analysis"], size["seed"]) == ("analysis", "size", 3)
    assert "rows" not in study
