"""The first message of a report."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qadtr_brevitas.auditing.finding import AuditReport, Finding
from qadtr_brevitas.auditing.headline import audit_headline, headline
from qadtr_brevitas.auditing.standings import is_guessing
from qadtr_brevitas.evaluation.metrics import Proportion
from qadtr_brevitas.evaluation.report import CertifiedCell, EvaluationReport, Rate
from qadtr_brevitas.evaluation.report.schema import WorstCase
from tests.auditing.support import precision_audits
from tests.reproduce.page.support import make_report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> EvaluationReport:
    """Return a report of `a`, fooled at 8 and 4 bit, and `b`, fooled at 4 bit only."""
    return make_report(tmp_path_factory.mktemp("report"))


def audit(name: str, *statuses: str) -> AuditReport:
    findings = tuple(
        Finding(id=f"G{number}", title="x", status=status, meaning="gradients are masked.")  # pyright: ignore
        for number, status in enumerate(statuses, 1)
    )
    parts = precision_audits(("8", "4"), findings)
    return AuditReport(
        model=name, fingerprint=f"{name}-weights", profile="quick", settings={}, seed=0, images=10, precisions=parts
    )


def test_it_says_what_resists_best_at_which_precision_and_price(report: EvaluationReport) -> None:
    first = headline(report)
    assert first is not None
    resists, price, trust = first.sentences
    assert "b at 8 bit resists best" in resists
    assert "right on 100.0 % of 40 test images, and still on 100.0 % under all 4 attacks" in resists
    assert "none" in price
    assert "not audited" in trust
    rows = {row[:2]: row[2:] for row in first.table.rows if row}
    assert list(rows) == [("a", "8 bit"), ("a", "4 bit"), ("b", "8 bit"), ("b", "4 bit")]
    # Of 40 images the 10 of the target class cannot be turned into it.
    assert rows["b", "8 bit"] == ("100.0", "100.0", "0.0", "lavan", "not audited")
    assert rows["a", "8 bit"] == ("100.0", "25.0", "100.0", "lavan", "not audited")


def test_an_audit_alone_says_first_what_it_breaks_and_whether_it_warns() -> None:
    first = audit_headline(audit("net", "pass", "WARN"))
    weakest = max(audit("net").precisions, key=lambda part: part.worst_case.value or 0.0)
    broken, trust = first.sentences
    assert f"net at {weakest.precision} bit resists least: of {weakest.worst_case.n} images" in broken
    assert "Audit G2 of net at 8 bit" in trust
    assert [row[:2] for row in first.table.rows] == [("net", "8 bit"), ("net", "4 bit")]


@pytest.mark.parametrize(
    ("statuses", "word", "cell"),
    [
        (["pass", "pass", "skipped"], "warns of nothing", "no warning"),
        (["pass", "WARN", "skipped"], "not yet. Audit G2", "G2"),
        (["pass", "skipped", "skipped"], "AUDIT INCOMPLETE. 2 of 3 checks", "incomplete"),
    ],
)
def test_whether_the_figures_can_be_trusted(
    report: EvaluationReport, statuses: list[str], word: str, cell: str
) -> None:
    first = headline(report, [audit("a", *statuses), audit("b", *statuses)])
    assert first is not None
    assert word in first.sentences[-1]
    assert {row[-1] for row in first.table.rows if row} == {cell}
    one = headline(report, [audit("a", "pass")])
    assert one is not None
    assert "not everything was audited" in one.sentences[-1]


def test_a_line_that_met_fewer_attacks_is_never_the_best(report: EvaluationReport) -> None:
    def fewer(cell: WorstCase) -> WorstCase:
        easy = (cell.model, cell.precision) == ("b", "8")
        return cell.model_copy(update={"attacks": cell.attacks - 2}) if easy else cell

    worst_case = tuple(fewer(cell) for cell in report.worst_case)
    first = headline(report.model_copy(update={"worst_case": worst_case}))
    assert first is not None
    assert first.sentences[0].startswith("a at 8 bit resists best")
    column = first.table.header.index("under attack")
    cells = [row[column] for row in first.table.rows if row]
    assert [cell.partition(" ")[2] for cell in cells] == ["(of 4)", "(of 4)", "(of 2)", "(of 4)"]
    unattacked = tuple(cell for cell in report.worst_case if (cell.model, cell.precision) != ("b", "8"))
    first = headline(report.model_copy(update={"worst_case": unattacked}))
    assert first is not None
    assert first.sentences[0].startswith("a at 8 bit resists best")


def test_nothing_resists_that_is_right_on_no_image_under_the_attacks(report: EvaluationReport) -> None:
    none = Rate.of(Proportion(0, 40))
    broken = tuple(case.model_copy(update={"robust_accuracy": none}) for case in report.worst_case)
    several = headline(report.model_copy(update={"worst_case": broken}))
    assert several is not None
    assert several.sentences[0].startswith("Nothing resists")

    def of_one(cells: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(cell for cell in cells if (cell.model, cell.precision) == ("a", "4"))

    models = tuple(model for model in report.models if model.name == "a")
    one = {"models": models, "clean": of_one(report.clean), "cells": of_one(report.cells), "worst_case": of_one(broken)}
    single = headline(report.model_copy(update=one))
    assert single is not None
    assert "resists" not in single.sentences[0]
    assert "still on 0.0 %" in single.sentences[0]


def test_a_network_that_guesses_does_not_resist(report: EvaluationReport) -> None:
    """One class of four said always is right on a quarter of the images, and no patch changes that."""
    quarter = Rate.of(Proportion(10, 40))
    guesses = tuple(cell.model_copy(update={"accuracy": quarter}) for cell in report.clean)
    all_guess = headline(report.model_copy(update={"clean": guesses}))
    assert all_guess is not None
    assert all_guess.sentences[0].startswith("Nothing resists")
    assert "Guessing one of 4 classes" in all_guess.sentences[0]
    # Under attack `a` at 4 bit, which is broken, keeps less than a network that guesses, and still comes before it.
    pairs = zip(report.clean, guesses, strict=True)
    others = tuple(right if (right.model, right.precision) == ("a", "4") else guess for right, guess in pairs)
    one_is_better = headline(report.model_copy(update={"clean": others}))
    assert one_is_better is not None
    assert one_is_better.sentences[0].startswith("a at 4 bit resists best")
    assert "Guessing" not in one_is_better.sentences[0]


@pytest.mark.parametrize(("right", "guesses"), [(0, True), (20, True), (27, True), (28, False), (100, False)])
def test_guessing_is_told_by_the_interval(right: int, guesses: bool) -> None:
    """Lower limits of 27 and 28 of 100 are 19.3 and 20.1 %, by scipy's `binomtest(...).proportion_ci("wilson")`."""
    assert is_guessing(Rate.of(Proportion(right, 100)), classes=5) is guesses


def test_without_attacks_it_is_about_accuracy(report: EvaluationReport) -> None:
    clean = report.model_copy(update={"cells": (), "worst_case": ()})
    first = headline(clean)
    assert first is not None
    assert "no attack was made" in first.sentences[0]
    assert first.table.header == ("model", "at", "right")
    assert headline(clean.model_copy(update={"clean": ()})) is None


def certified(model: str, precision: str, proved: int) -> CertifiedCell:
    """A certificate of 90 right defended predictions of 100."""
    return CertifiedCell(
        model=model,
        precision=precision,
        size=5,
        masks=36,
        clean_accuracy=Rate.of(Proportion(90, 100)),
        certified_accuracy=Rate.of(Proportion(proved, 100)),
    )


def test_certified_and_defended_accuracy_stand_there_with_their_intervals(report: EvaluationReport) -> None:
    cells = (certified("b", "8", 50), certified("b", "4", 40))
    first = headline(report.model_copy(update={"certified": cells}))
    assert first is not None
    # Wilson's intervals of 50 and 90 of 100, as in tables of them.
    assert "Proved: on 50.0 % (40.4 to 59.6) of 100 images no patch of 5x5" in first.sentences[0]
    assert "right on 90.0 % (82.6 to 94.5) of them" in first.sentences[0]
    columns = [first.table.header.index(name) for name in ("defended", "proved")]
    rows = {row[:2]: tuple(row[column] for column in columns) for row in first.table.rows if row}
    assert rows["b", "8 bit"] == ("90.0 (82.6 to 94.5)", "50.0 (40.4 to 59.6)")
    assert rows["a", "8 bit"] == ("-", "-")


def test_of_many_models_each_has_one_line(tmp_path: Path) -> None:
    names = tuple("abcdefg")
    first = headline(make_report(tmp_path, names=names))
    assert first is not None
    assert [row[0] for row in first.table.rows if row] == list(names)
    assert any("resists best" in note for note in first.table.notes)


def test_nothing_breaks_in_a_narrow_terminal(report: EvaluationReport) -> None:
    both = report.model_copy(update={"certified": (certified("b", "8", 50),)})
    first = headline(both, [audit("a", "pass"), audit("b", "WARN")])
    assert first is not None
    text = StringIO()
    Console(file=text, width=80).print(first.rich())
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    words = text.getvalue().split()
    for name in ("highest", "ASR", "lavan", "100.0", "defended", "proved", "90.0", "50.0"):
        assert name in words
    assert "| a | 8 bit |" in first.markdown()
