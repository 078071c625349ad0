from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch

from qadtr_brevitas.core.table import Table
from qadtr_brevitas.evaluation import NamedAttack, evaluate
from qadtr_brevitas.evaluation.report import EvaluationReport
from qadtr_brevitas.evaluation.report.matrices import model_matrix, precision_matrices, size_tables
from qadtr_brevitas.evaluation.report.summaries import tables, worst_case_table
from qadtr_brevitas.quant.inference import parse_mode
from tests.evaluation.fakes import Reader, Whiten, coded_split, make_grid, reader, small_report, white_patch


def rows(table: Table) -> list[list[str]]:
    return [list(row) for row in table.rows if row]


def test_models_by_models_at_equal_precision_and_from_float(tmp_path: Path) -> None:
    (table,) = model_matrix(small_report(tmp_path, models=("reader", "other")), "lavan 2x2")
    assert table.header == ("attacked at", "made on", "on reader", "on other")
    assert rows(table) == [
        ["8 bit", "reader at 8", "100.0", "0.0"],
        ["", "other at 8", "100.0", "0.0"],
        ["", "random patch", "0.0", "0.0"],
        ["", "n of ASR", "30", "30"],
        ["4 bit", "reader at 4", "100.0", "100.0"],
        ["", "other at 4", "100.0", "100.0"],
        ["", "random patch", "0.0", "0.0"],
        ["", "n of ASR", "30", "30"],
    ]
    assert model_matrix(small_report(tmp_path), "lavan 2x2") == []


def test_patches_of_a_model_that_is_not_scored_make_a_matrix(tmp_path: Path) -> None:
    patches = [white_patch("moved", model="elsewhere", precision=32)]
    report = evaluate(make_grid([reader(model=Reader(fooled_at=(4,)))], patches), output=tmp_path)
    (table,) = model_matrix(report, "lavan 2x2")
    assert [row[:3] for row in rows(table)] == [
        ["8 bit", "elsewhere at 32", "0.0"],
        ["", "random patch", "0.0"],
        ["", "n of ASR", "30"],
        ["4 bit", "elsewhere at 32", "100.0"],
        ["", "random patch", "0.0"],
        ["", "n of ASR", "30"],
    ]


def image_report(tmp_path: Path) -> EvaluationReport:
    attacks = [NamedAttack("whiten", Whiten(side=side)) for side in (2, 1)]
    grid = make_grid([reader(model=Reader(fooled_at=(4,)))], attacks=attacks, eot=[parse_mode("8+4")])
    return evaluate(grid, output=tmp_path)


def test_image_attacks_fill_the_same_tables_as_patches(tmp_path: Path) -> None:
    report = image_report(tmp_path)
    titles = [table.title for table in tables(report)]
    assert titles[:4] == [
        "ASR of each attack, made on the model and precision attacked",
        "whiten: clean accuracy and ASR at each precision",
        "whiten side=1: clean accuracy and ASR at each precision",
        "Robust accuracy under all attacks together",
    ]
    (matrix,) = precision_matrices(report, "whiten")
    assert matrix.header == ("bit", "at 8", "at 4")
    assert [row[0] for row in rows(matrix)] == ["made at 8", "made at 4", "made at 8+4", "n of ASR"]
    assert rows(matrix)[:2] == [["made at 8", "0.0", "0.0"], ["made at 4", "0.0", "75.0"]]
    assert rows(tables(report)[0]) == [["reader", "whiten", "0.0", "75.0"], ["", "whiten side=1", "0.0", "0.0"]]
    summary = {row[1]: row[2:] for row in rows(tables(report)[1])}
    assert summary["ASR white-box"] == ["0.0", "75.0"]
    assert "ASR, made on a mean over precisions" in summary
    assert "ASR of a random patch" not in summary
    assert summary["n of ASR"] == ["40", "40"]


class Blind(Whiten):
    black_box: ClassVar[bool] = True


def test_what_sees_outputs_alone_is_called_black_box(tmp_path: Path) -> None:
    grid = make_grid([reader(model=Reader(fooled_at=(4,)))], attacks=[NamedAttack("blind", Blind())])
    found = {table.title: table for table in tables(evaluate(grid, output=tmp_path))}
    labels = {row[1] for row in rows(found["blind: clean accuracy and ASR at each precision"])}
    assert "ASR black-box" in labels
    assert "ASR white-box" not in labels


def test_searched_shapes_of_as_many_pixels_are_one_family(tmp_path: Path) -> None:
    masks = ((True, True, True), (True, False, False)), ((True, True), (True, True))
    patches = []
    for number, mask in enumerate(masks):
        covered = torch.tensor(mask)
        made = white_patch(f"patch {number}", target=number)
        meta = {**made.patch.meta, "attack": "dpr", "settings": {"rays": 36}}
        texture = torch.ones(3, *covered.shape)
        patches.append(replace(made, patch=replace(made.patch, texture=texture, mask=covered, meta=meta)))
    report = evaluate(make_grid([reader()], patches), output=tmp_path)
    assert {patch.family for patch in report.patches if not patch.control} == {"dpr 4 pixels"}


def test_worst_case_table_leaves_out_transfers_where_there_are_none(tmp_path: Path) -> None:
    transferred = {row[1]: row[2:] for row in rows(tables(image_report(tmp_path))[3])}
    assert transferred["own attacks: number of attacks"] == ["4", "4"]
    assert transferred["with transfers: number of attacks"] == ["6", "6"]
    alone = evaluate(
        make_grid([reader()], attacks=[NamedAttack("whiten", Whiten())], transfer="none"), output=tmp_path / "alone"
    )
    labels = [row[1] for row in rows(tables(alone)[1])]
    assert labels == [
        "clean accuracy",
        "own attacks: mean",
        "own attacks: worst case",
        "own attacks: 95 % interval",
        "own attacks: number of attacks",
    ]


def test_worst_case_without_the_ensemble_of_patches_is_said_to_be_one(tmp_path: Path) -> None:
    images = NamedAttack("whiten", Whiten())
    report = evaluate(make_grid([reader()], attacks=[images], transfer="none"), output=tmp_path)
    assert "--attack '{name: patch-auto, size: 8}'" in worst_case_table(report).notes[-1]
    pixels = tuple(facts.model_copy(update={"settings": {"eps": 0.03}}) for facts in report.attacks)
    # Another kind of attack, beside which a patch has no place.
    with_pixels_only = report.model_copy(update={"attacks": pixels})
    assert not any("--attack" in note for note in worst_case_table(with_pixels_only).notes)
    with_ensemble = report.model_copy(
        update={"attacks": tuple(facts.model_copy(update={"attack": "patch-auto"}) for facts in report.attacks)}
    )
    assert not any("--attack" in note for note in worst_case_table(with_ensemble).notes)


def test_patch_sizes_are_rows_from_small_to_large(tmp_path: Path) -> None:
    patches = [white_patch(f"{side}-{bits}", side=side, precision=bits) for side in (3, 1, 2) for bits in (8, 4)]
    report = evaluate(make_grid([reader()], patches, coded_split()), output=tmp_path)
    (table,) = size_tables(report)
    assert table.title == "lavan: ASR on reader by patch size"
    assert table.header == ("made", "size", "8 bit", "4 bit")
    assert rows(table)[:3] == [
        ["white-box", "1x1", "0.0", "0.0"],
        ["", "2x2", "100.0", "100.0"],
        ["", "3x3", "100.0", "100.0"],
    ]
    assert rows(table)[-1] == ["n of ASR", "", "30", "30"]
    assert size_tables(small_report(tmp_path)) == []
