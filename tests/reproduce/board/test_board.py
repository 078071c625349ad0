"""The board: who is admitted, who is refused and why, in which order, under which names."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qadtr_brevitas.auditing.finding import AuditReport, Finding, Status
from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.files import write_json
from qadtr_brevitas.evaluation.metrics import Proportion
from qadtr_brevitas.evaluation.report import CertifiedCell, EvaluationReport, Rate
from qadtr_brevitas.evaluation.report.files import write_report
from qadtr_brevitas.pipeline.directories import AUDIT_FILE
from qadtr_brevitas.reproduce.board import Board, build_board, read_submissions
from qadtr_brevitas.reproduce.board.files import board_csv, board_json
from qadtr_brevitas.reproduce.board.page import ranking
from qadtr_brevitas.reproduce.board.rules import RULES
from tests.auditing.support import precision_audits
from tests.evaluation.fakes import coded_split
from tests.reproduce.page.support import make_report

CHECKS = [f"G{number}" for number in range(1, 23)]


def write_audit(
    folder: Path, report: EvaluationReport, *, precisions: tuple[str, ...] = ("8", "4"), **given: Status
) -> None:
    """Write an audit of all models that warns of nothing but what is given, as G8="WARN"."""
    findings = tuple(
        Finding(id=id, title="x", status=given.get(id, "pass"), meaning=f"meaning of {id}") for id in CHECKS
    )
    parts = precision_audits(precisions, findings)
    audits = [
        AuditReport(
            model=model.name,
            fingerprint=model.fingerprint,
            profile="quick",
            settings={},
            seed=0,
            images=10,
            precisions=parts,
        )
        for model in report.models
    ]
    write_json(folder / AUDIT_FILE, [audit.model_dump(mode="json") for audit in audits])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report that sets the protocol: `a`, fooled at 8 and 4 bit, and `b`, fooled at 4 bit."""
    folder = tmp_path_factory.mktemp("first") / "alice" / "evaluation"
    write_audit(folder, make_report(folder))
    return folder


@pytest.fixture(scope="module")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few") / "evaluation"
    write_audit(folder, make_report(folder, names=("a",), split=coded_split(20)))
    return folder


def copy(first: Path, folder: Path, **changes: Any) -> Path:
    """Hand in the first report again, changed, with an audit that warns of nothing."""
    report = EvaluationReport.model_validate_json((first / "report.json").read_bytes()).model_copy(update=changes)
    write_report(report, folder)
    write_audit(folder, report)
    return folder


def board(*folders: Path) -> Board:
    return build_board(read_submissions(folders))


def reasons(found: Board, submission: str) -> dict[str, str]:
    return {rule: why for line in found.refused if line.submission == submission for rule, why in line.refused.items()}


def admitted(found: Board) -> list[tuple[str, str, str]]:
    return [(p, line.submission, line.model.name) for p, lines in found.admitted.items() for line in lines]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["board", *map(str, arguments)])


def test_a_complete_report_is_admitted_and_ranked_by_what_it_resists(first: Path) -> None:
    found = board(first)
    assert not found.refused
    # b is fooled at 4 bit only; at 4 bit the two are equal, and their names decide.
    assert [(p, model) for p, _, model in admitted(found)] == [("8", "b"), ("8", "a"), ("4", "a"), ("4", "b")]
    values = [line.robust.value for line in found.admitted["8"] if line.robust]
    assert values == [1.0, 0.25]


def test_certified_and_defended_accuracy_stand_on_the_board_with_their_intervals(first: Path, tmp_path: Path) -> None:
    defended, proved = Rate.of(Proportion(90, 100)), Rate.of(Proportion(50, 100))
    cell = CertifiedCell(model="b", precision="8", size=5, masks=36, clean_accuracy=defended, certified_accuracy=proved)
    found = board(first, copy(first, tmp_path / "bob", certified=(cell,)))
    table = ranking(found, "8")
    columns = [table.header.index(name) for name in ("defended", "proved")]
    shown = {(row[1], row[2]): tuple(row[column] for column in columns) for row in table.rows if row}
    assert shown["bob", "b"] == ("90.0 (82.6 to 94.5)", "50.0 (40.4 to 59.6), 5x5")
    assert shown["bob", "a"] == ("-", "-")
    (row,) = (
        row
        for row in csv.DictReader(StringIO(board_csv(found)))
        if (row["report"], row["model"], row["precision"]) == ("bob", "b", "8")
    )
    names = ("defended_accuracy", "defended_accuracy_n", "certified_accuracy", "certified_accuracy_n")
    assert [float(row[name]) for name in names] == [0.9, 100, 0.5, 100]
    assert float(row["certified_accuracy_low"]) == pytest.approx(0.404, abs=5e-4)


@pytest.mark.parametrize(
    ("given", "rule", "words"),
    [
        ({"G5": "skipped"}, "audit complete", "G5"),
        (dict.fromkeys(CHECKS[:12], "skipped"), "audit complete", "12 of 22"),
        ({"G9": "WARN"}, "no randomness", "EOT"),
        ({"G8": "WARN"}, "gradients", "meaning of G8"),
        ({"G6": "WARN"}, None, ""),
    ],
)
def test_rules_on_the_audit(
    first: Path, tmp_path: Path, given: dict[str, Status], rule: str | None, words: str
) -> None:
    folder = copy(first, tmp_path / "bob")
    write_audit(folder, EvaluationReport.model_validate_json((folder / "report.json").read_bytes()), **given)
    found = board(first, folder)
    refused = reasons(found, "bob")
    assert list(refused) == ([] if rule is None else [rule])
    if rule:
        assert words in refused[rule]
    assert len([line for line in admitted(found) if line[1] == "bob"]) == (4 if rule is None else 0)


def test_a_report_without_an_audit_or_with_one_of_other_precisions(first: Path, tmp_path: Path) -> None:
    folder = copy(first, tmp_path / "bob")
    write_audit(folder, EvaluationReport.model_validate_json((folder / "report.json").read_bytes()), precisions=("8",))
    found = board(first, folder)
    assert [line.standing.precision for line in found.refused] == ["4", "4"]
    (folder / AUDIT_FILE).unlink()
    assert "--audit" in reasons(board(first, folder), "bob")["audit complete"]


def test_random_outputs_are_admitted_with_an_attack_on_their_mean(first: Path, tmp_path: Path) -> None:
    report = EvaluationReport.model_validate_json((first / "report.json").read_bytes())
    cells = tuple(
        cell.model_copy(update={"threat": "eot"}) if cell.threat == "white-box" else cell for cell in report.cells
    )
    folder = copy(first, tmp_path / "bob", cells=cells)
    write_audit(folder, report, G9="WARN")
    assert not board(folder).refused


def test_a_network_that_guesses_is_refused(first: Path, tmp_path: Path) -> None:
    report = EvaluationReport.model_validate_json((first / "report.json").read_bytes())
    clean = tuple(cell.model_copy(update={"accuracy": Rate.of(Proportion(10, 40))}) for cell in report.clean)
    refused = reasons(board(first, copy(first, tmp_path / "bob", clean=clean)), "bob")
    assert list(refused) == ["accuracy"]
    assert "guessing one of 4 classes" in refused["accuracy"]


def test_other_images_or_fewer_are_refused(first: Path, few_images: Path, tmp_path: Path) -> None:
    report = EvaluationReport.model_validate_json((first / "report.json").read_bytes())
    assert reasons(board(first, few_images), "evaluation") == {}
    found = board(first, few_images)
    assert {rule for line in found.refused for rule in line.refused} == {"number of images"}
    assert "20 images instead of 40" in found.refused[0].refused["number of images"]
    for change, words in (({"name": "other"}, "of other"), ({"fingerprint": "x"}, "other 40 images")):
        folder = copy(first, tmp_path / words.replace(" ", "-"), data=report.data.model_copy(update=change))
        assert words in reasons(board(first, folder), folder.name)["same data"]


def changed_patches(first: Path, **change: Any) -> dict[str, Any]:
    report = EvaluationReport.model_validate_json((first / "report.json").read_bytes())
    return {"patches": tuple(patch.model_copy(update=change) for patch in report.patches)}


@pytest.mark.parametrize(
    ("change", "rule", "words"),
    [
        ({"attack": "gap"}, "attack", "gap instead of 1 x lavan"),
        ({"height": 3, "width": 3, "pixels": 9}, "patch size", "3x3 instead of 1 x lavan, 2x2"),
        ({"settings": {"steps": 9}}, "attack settings", "steps=9 instead of 3"),
        ({"place": (0, 0)}, "patch size", "at 0,0"),
    ],
)
def test_other_attacks_are_refused(first: Path, tmp_path: Path, change: dict[str, Any], rule: str, words: str) -> None:
    folder = copy(first, tmp_path / "bob", **changed_patches(first, **change))
    refused = reasons(board(first, folder), "bob")
    assert list(refused) == [rule]
    assert words in refused[rule]


def test_a_report_without_attacks_or_at_a_precision_of_its_own_is_refused(first: Path, tmp_path: Path) -> None:
    folder = copy(first, tmp_path / "bob", cells=(), worst_case=())
    assert {"attacked"} == set(reasons(board(first, folder), "bob"))
    report = EvaluationReport.model_validate_json((first / "report.json").read_bytes())
    only8 = copy(first, tmp_path / "only8", clean=tuple(cell for cell in report.clean if cell.precision == "8"))
    refused = reasons(board(only8, first), "evaluation")
    assert list(refused) == ["precision"]
    assert "4 bit" in refused["precision"]


def test_every_rule_refuses_in_some_test() -> None:
    text = Path(__file__).read_text()
    assert all(f'"{rule.name}"' in text for rule in RULES)


def test_what_was_transferred_from_other_models_does_not_count(first: Path) -> None:
    found = board(first)
    assert {line.attacks for lines in found.admitted.values() for line in lines} == {1}


def test_two_people_with_the_same_file_names_are_told_apart(first: Path, tmp_path: Path) -> None:
    folders = [copy(first, tmp_path / name / "runs" / "x" / "evaluation") for name in ("bob", "carol")]
    assert [submission.name for submission in read_submissions([tmp_path])] == ["bob", "carol"]
    names = [submission.name for submission in read_submissions([*folders, folders[0], first])]
    assert names == ["bob/runs/x", "carol/runs/x", "alice"]
    assert len(set(admitted(board(*folders)))) == 8


def test_a_damaged_report_costs_nobody_else_a_place(first: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "report.json").write_text('{"schema_version": 4}')
    found = board(first, tmp_path)
    assert len(admitted(found)) == 4
    assert "damaged" in found.unread["bad"]
    with pytest.raises(UsageError, match="--protocol"):
        board(tmp_path, first)


def test_the_files_hold_the_same_and_names_are_escaped(first: Path, few_images: Path, tmp_path: Path) -> None:
    report = EvaluationReport.model_validate_json((first / "report.json").read_bytes())
    bad = "<script>alert(1)</script>"
    models = tuple(model.model_copy(update={"name": bad}) for model in report.models[:1])
    mine = [
        tuple(c.model_copy(update={"model": bad}) for c in found if c.model == "a")
        for found in (report.clean, report.cells, report.worst_case)
    ]
    copy(first, tmp_path / "<b>", models=models, clean=mine[0], cells=mine[1], worst_case=mine[2])
    output = tmp_path / "out" / "board.html"
    result = run(first, tmp_path, few_images, "--json", "-o", output)
    assert result.exit_code == 0, result.output
    page = output.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "20 images instead of 40" in page
    told = json.loads(output.with_suffix(".json").read_text())
    printed = json.loads(result.stdout)
    assert told["admitted"] == printed["admitted"]
    assert [line["rank"] for line in told["admitted"]] == [1, 2, 3, 1, 2, 3]
    assert told["refused"][0]["reasons"]["number of images"]
    rows = list(csv.DictReader(StringIO(output.with_suffix(".csv").read_text())))
    assert len(rows) == len(told["admitted"]) + len(told["refused"])
    assert [row["robust_accuracy"] for row in rows[:3]] == ["1.0", "0.25", "0.25"]
    assert rows[-1]["rank"] == ""
    assert "instead of 40" in rows[-1]["refused"]


def test_the_protocol_may_be_another_report(first: Path, few_images: Path, tmp_path: Path) -> None:
    result = run(first, few_images, "--protocol", few_images, "--json", "-o", tmp_path / "b.html")
    told = json.loads(result.stdout)
    assert {line["model"] for line in told["admitted"]} == {"a"}
    assert len(told["refused"]) == 4


def test_bad_input(tmp_path: Path) -> None:
    assert "no folder" in run(tmp_path / "nothing").output
    assert "report.json" in run(tmp_path).output
    assert run(tmp_path).exit_code == 2


def test_nothing_admitted_is_a_page_too(first: Path, tmp_path: Path) -> None:
    folder = copy(first, tmp_path / "bob")
    (folder / AUDIT_FILE).unlink()
    found = board(folder)
    assert not admitted(found)
    assert board_json(found)["admitted"] == []
    assert board_csv(found).count("--audit") == 4
    assert (
        "Nothing is admitted"
        in CliRunner().invoke(cli, ["board", str(folder), "-o", str(tmp_path / "b.html")]).output
        + (tmp_path / "b.html").read_text()
    )
