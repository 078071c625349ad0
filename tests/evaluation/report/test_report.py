from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.core.table import Table
from qadtr_brevitas.evaluation import evaluate
from qadtr_brevitas.evaluation.report import SCHEMA_VERSION, EvaluationReport, read_report
from qadtr_brevitas.evaluation.report.csv_tables import cells_csv
from qadtr_brevitas.evaluation.report.files import write_report
from qadtr_brevitas.evaluation.report.markdown import markdown
from qadtr_brevitas.evaluation.report.summaries import clean_table, tables, terminal_tables
from qadtr_brevitas.evaluation.report.views import families
from tests.evaluation.fakes import make_grid, reader, small_report, white_patch

RATE = {"count", "n", "value", "low", "high"}
# Programs read these keys: a change needs a new schema version.
SCHEMA: dict[str, Any] = {
    "schema_version": None,
    "created": None,
    "command": None,
    "versions": {"python", "qadtr-brevitas", "torch", "brevitas", "timm"},
    "seed": None,
    "device": None,
    "data": {"name", "settings", "split", "images", "available", "image_size", "classes", "fingerprint"},
    "models": {"name", "path", "fingerprint", "architecture", "settings", "source", "precisions"},
    "patches": {
        "name",
        "file",
        "fingerprint",
        "attack",
        "settings",
        "apart",
        "target",
        "height",
        "width",
        "pixels",
        "place",
        "geometry",
        "source",
        "control",
        "variant",
    },
    "attacks": None,
    "clean": {"model", "precision", "accuracy"},
    "cells": {
        "model",
        "precision",
        "attack",
        "target",
        "threat",
        "asr",
        "asr_all",
        "untargeted",
        "clean_accuracy",
        "robust_accuracy",
    },
    "certified": None,
    "worst_case": {"model", "precision", "scope", "attacks", "mean", "robust_accuracy"},
}


def find(report: EvaluationReport, title: str) -> Table:
    return next(table for table in tables(report) if title in table.title)


def rows(table: Table) -> list[list[str]]:
    return [list(row) for row in table.rows if row is not None]


def test_schema_is_stable(tmp_path: Path) -> None:
    report = small_report(tmp_path)
    write_report(report, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert SCHEMA_VERSION == content["schema_version"] == 4
    assert set(content) == set(SCHEMA)
    for key, expected in SCHEMA.items():
        part = content[key]
        if expected:
            assert set(part[0] if isinstance(part, list) else part) == expected
    assert set(content["cells"][0]["asr"]) == set(content["clean"][0]["accuracy"]) == RATE
    assert set(content["patches"][0]["source"]) == {"name", "fingerprint", "precision"}


def test_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = small_report(tmp_path, targets=(None, 1))
    write_report(report, tmp_path)
    assert read_report(tmp_path) == read_report(tmp_path / "report.json") == report


def test_report_without_certifications_is_read_as_one_of_the_version_before(tmp_path: Path) -> None:
    report = small_report(tmp_path)
    write_report(report, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    del content["certified"]
    (tmp_path / "report.json").write_text(json.dumps({**content, "schema_version": 2}))
    assert read_report(tmp_path).cells == report.cells


def test_certifications_of_version_3_name_no_masks_and_images(tmp_path: Path) -> None:
    write_report(small_report(tmp_path), tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    rate = {"count": 3, "n": 10, "value": 0.3, "low": 0.1, "high": 0.6}
    cell = {"model": "reader", "precision": "4", "method": "double masking", "size": 5, "masks": 36}
    content["certified"] = [{**cell, "clean_accuracy": rate, "certified_accuracy": rate}]
    (tmp_path / "report.json").write_text(json.dumps({**content, "schema_version": 3}))
    (found,) = read_report(tmp_path).certified
    assert (found.label, found.passes, found.weights_fingerprint) == ("5x5, 36 masks", None, "")


def test_patches_of_older_reports_have_the_present_names_of_keys(tmp_path: Path) -> None:
    write_report(small_report(tmp_path), tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    content["patches"][0]["settings"] = {"np": 0.08, "steps": 3}
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert read_report(tmp_path).patches[0].settings == {"area": 0.08, "steps": 3}


def test_missing_or_foreign_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no report at .*qadtr-brevitas evaluate"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text('{"schema_version": 99}')
    with pytest.raises(
        CheckpointError,
        match=r"version 99.*2 to 4.*qadtr-brevitas",
    ):
        read_report(tmp_path)
    write_report(small_report(tmp_path), tmp_path)
    old = json.loads((tmp_path / "report.json").read_text()) | {"schema_version": 1}
    (tmp_path / "report.json").write_text(json.dumps(old))
    with pytest.raises(CheckpointError, match=r"has report schema version 1, .* finished are not computed again"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text('{"schema_version": 2}')
    with pytest.raises(CheckpointError, match="is damaged: make it anew"):
        read_report(tmp_path)


def test_summary_compares_models_in_blocks(tmp_path: Path) -> None:
    table = tables(small_report(tmp_path, models=("reader", "other")))[0]
    assert table.header == ("model", "", "8 bit", "4 bit")
    assert rows(table) == [
        ["reader", "clean accuracy", "100.0", "100.0"],
        ["", "ASR white-box", "100.0", "100.0"],
        ["", "95 % interval", "88.6 to 100.0", "88.6 to 100.0"],
        ["", "ASR of a random patch", "0.0", "0.0"],
        ["", "n of ASR", "30", "30"],
        ["", "ASR over all images", "100.0", "100.0"],
        ["", "robust accuracy", "25.0", "25.0"],
        ["other", "clean accuracy", "100.0", "100.0"],
        ["", "ASR white-box", "0.0", "100.0"],
        ["", "95 % interval", "0.0 to 11.4", "88.6 to 100.0"],
        ["", "ASR of a random patch", "0.0", "0.0"],
        ["", "n of ASR", "30", "30"],
        ["", "ASR over all images", "25.0", "100.0"],
        ["", "robust accuracy", "100.0", "25.0"],
    ]
    assert table.rows[7] is None
    assert "of n = 40 test images" in table.notes[0]
    assert "Targets: 2 (c). Seed 0." in table.notes


def test_white_box_table_has_every_figure_with_its_denominator(tmp_path: Path) -> None:
    table = find(small_report(tmp_path, targets=(2, 1)), "each precision under what was made at it")
    cells = {row[1]: row[2:] for row in rows(table)}
    assert cells == {
        "ASR": ["50.0", "50.0"],
        "95 % interval": ["33.2 to 66.8", "33.2 to 66.8"],
        "lowest to highest": ["0.0 to 100.0", "0.0 to 100.0"],
        "ASR of a random patch": ["0.0", "0.0"],
        "any wrong class": ["75.0", "75.0"],
        "any wrong class, random patch": ["0.0", "0.0"],
        "ASR over all images": ["50.0", "50.0"],
        "robust accuracy": ["25.0", "25.0"],
        "n of ASR": ["30", "30"],
        "number of attacks": ["2", "2"],
    }
    assert "of n = 40 test images" in " ".join(table.notes)
    assert "Targets: 1 (b), 2 (c). Seed 0." in table.notes


def test_matrix_is_source_precision_by_attacked_precision(tmp_path: Path) -> None:
    report = small_report(tmp_path, models=("reader", "other"))
    titles = [table.title for table in tables(report) if table.header[0] == "bit"]
    assert titles == [
        f"lavan 2x2: ASR, {source} to {model}" for source in ("reader", "other") for model in ("reader", "other")
    ]
    table = find(report, "ASR, reader to other")
    assert table.header == ("bit", "at 8", "at 4")
    assert rows(table) == [
        ["made at 8", "0.0", "100.0"],
        ["made at 4", "0.0", "100.0"],
        ["random patch", "0.0", "0.0"],
        ["n of ASR", "30", "30"],
    ]
    assert "classified correctly by other" in table.notes[0]


def test_clean_table_has_an_interval(tmp_path: Path) -> None:
    table = clean_table(small_report(tmp_path))
    assert rows(table) == [
        ["reader", "clean accuracy", "100.0", "100.0"],
        ["", "95 % interval", *["91.2 to 100.0"] * 2],
    ]
    assert table.notes == ("Percent of n = 40 test images.",)


def test_families_are_not_averaged_together(tmp_path: Path) -> None:
    patches = [white_patch("a"), white_patch("b", side=3), white_patch("c", target=None)]
    report = evaluate(make_grid([reader()], patches), output=tmp_path)
    assert families(report) == ["lavan 2x2", "lavan 3x3", "lavan 2x2 untargeted"]
    untargeted = {row[1]: row[2:] for row in rows(find(report, "lavan 2x2 untargeted: each precision"))}
    assert untargeted["n of ASR"] == ["-", "40"]


def test_report_without_patches_has_clean_accuracies(tmp_path: Path) -> None:
    report = evaluate(make_grid([reader()], [], available=100), output=tmp_path)
    (table,) = tables(report)
    assert table.notes == ("Percent of n = 40 test images (of 100).",)
    assert "## Clean accuracy" in markdown(report)


def test_terminal_shows_comparisons_only_for_several_models(tmp_path: Path) -> None:
    several = [table.title for table in terminal_tables(small_report(tmp_path, models=("reader", "other")))]
    assert several == [
        "lavan 2x2: clean accuracy and ASR at each precision",
        "Robust accuracy under all attacks together",
        "lavan 2x2: ASR, model to model",
    ]
    assert len(terminal_tables(small_report(tmp_path))) == 5


def test_markdown_names_denominators_command_and_settings(tmp_path: Path) -> None:
    report = small_report(tmp_path)
    text = markdown(report, pictures=["asr.png"])
    for words in (
        "- Command: `qadtr-brevitas evaluate x`",
        "coded, all 40 images of the test split, 4 classes",
        "Seed 0",
        "|  | n of ASR | 30 | 30 |",
        "of n = 40 test images",
        "![asr](asr.png)",
        "| reader-8-2 | lavan | 2 | 2x2 | reader | 8 | as made | steps=3 |",
        "| reader | toy | a recipe | runs/reader | reader-weights |",
    ):
        assert words in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_csv_has_a_line_for_each_cell(tmp_path: Path) -> None:
    report = small_report(tmp_path)
    lines = list(csv.DictReader(StringIO(cells_csv(report))))
    assert len(lines) == len(report.cells)
    first = lines[0]
    assert (first["model"], first["attack"], first["threat"]) == ("reader", "reader-8-2", "white-box")
    assert (first["asr_count"], first["asr_n"], first["asr_value"]) == ("30", "30", "1.0")


def test_terminal_table_prints_every_cell(tmp_path: Path) -> None:
    from rich.console import Console

    table = tables(small_report(tmp_path))[0]
    console = Console(width=100, file=StringIO(), force_terminal=False)
    console.print(table.rich())
    text = console.file.getvalue()
    for words in (table.title, "ASR white-box", "100.0", "n of ASR", "In percent."):
        assert words in text


def test_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = small_report(tmp_path)
    write_report(report, tmp_path)
    before = (tmp_path / "report.json").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_report(report.model_copy(update={"seed": 5}), tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
