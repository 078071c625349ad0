from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import pytest

from qadtr_brevitas.core.table import Cell, Table
from qadtr_brevitas.evaluation.metrics import Proportion
from qadtr_brevitas.reproduce.page import read_inputs
from qadtr_brevitas.reproduce.page.compare import MeasuredCell, PaperComparison, compare, comparison_table
from qadtr_brevitas.reproduce.page.inputs import StudyInput
from qadtr_brevitas.reproduce.page.measurements import AT_FLOAT, WHITE_BOX, Measurement, study_measurements
from qadtr_brevitas.reproduce.page.study_file import StudyRow
from qadtr_brevitas.reproduce.paper import paper_table
from tests.reproduce.page.support import make_report, make_study


def measure(
    share: Proportion, *, what: str = "asr", origins: tuple[str, ...] = (WHITE_BOX,), **facets: str
) -> Measurement:
    found = {"subject": "PBAT", "model": "a", "precision": "8", "attack": "lavan", "patches": "seen", **facets}
    return Measurement.of_share(what, origins, found, share)


def at(comparison: PaperComparison, origin: str, row: int, column: int = 1) -> MeasuredCell | None:
    return comparison.measured[origin][row][column]


def first_block(table: Table) -> dict[str, tuple[Cell, ...]]:
    return {str(row[1]): row[2:] for row in takewhile(bool, table.rows) if row}


def test_values_of_an_evaluation_stand_beside_those_of_the_paper(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    report = make_report(study / "seen")
    (found_study,) = read_inputs([study])
    assert isinstance(found_study, StudyInput)
    comparison = compare(paper_table("table11"), study_measurements(found_study))
    found = at(comparison, WHITE_BOX, 0)
    own = next(c for c in report.cells if (c.model, c.precision, c.attack) == ("a", "8", "a-8"))
    assert found is not None
    assert (found.value, found.interval, found.n) == (own.asr.value, (own.asr.low, own.asr.high), own.asr.n)
    table = comparison_table(comparison)
    lines = first_block(table)
    # At 8 bit, the second column, every image of another class turns into the target.
    assert (lines["paper"][1], lines["here, white-box"][1]) == ("46.7", "100.0")
    assert lines["n, white-box"][1] == "30"


@pytest.mark.parametrize(("images", "difference"), [(200, "+53.3"), (99, None)])
def test_values_of_few_images_are_not_subtracted_from_the_paper(images: int, difference: str | None) -> None:
    comparison = compare(paper_table("table11"), [measure(Proportion(images, images))])
    table = comparison_table(comparison)
    lines = first_block(table)
    assert (lines["paper"][1], lines["here, white-box"][1]) == ("46.7", "100.0")
    assert lines.get("difference, white-box", (None,) * 2)[1] == difference
    assert any("100 images" in note for note in table.notes) == (images < 100)


def test_seeds_targets_and_patches_are_averaged() -> None:
    measures = [
        measure(Proportion(1, 10)),
        measure(Proportion(3, 10), model="a2"),
        measure(Proportion(8, 20), attack="gap"),
    ]
    found = at(compare(paper_table("table11"), measures), WHITE_BOX, 0)
    assert found is not None
    assert (found.value, found.measurements, found.n) == (pytest.approx(0.2), 2, 10)


def test_origins_of_attacks_are_kept_apart() -> None:
    measures = [
        measure(Proportion(1, 10)),
        measure(Proportion(5, 10), origins=(AT_FLOAT,), **{"from": "another model"}),
    ]
    comparison = compare(paper_table("table11"), measures)
    assert [found and found.value for found in (at(comparison, origin, 0) for origin in (WHITE_BOX, AT_FLOAT))] == [
        0.1,
        0.5,
    ]


def test_patches_made_on_the_model_itself_are_preferred() -> None:
    measures = [
        measure(Proportion(9, 10), origins=(AT_FLOAT,), **{"from": "another model"}),
        measure(Proportion(2, 10), origins=(AT_FLOAT,), **{"from": "itself"}),
    ]
    found = at(compare(paper_table("table11"), measures), AT_FLOAT, 0)
    assert found
    assert found.value == 0.2


def test_unseen_patches_have_rows_of_their_own_and_may_be_of_other_attacks() -> None:
    measures = [measure(Proportion(1, 10)), measure(Proportion(7, 10), patches="unseen", attack="dpr", size="10x11")]
    comparison = compare(paper_table("table11"), measures)
    values = [found and found.value for found in (at(comparison, WHITE_BOX, row) for row in range(6))]
    assert values == [0.1, None, None, 0.7, None, None]
    assert (
        at(compare(paper_table("table15"), [measure(Proportion(7, 10), subject="QADT-R Full")]), WHITE_BOX, 3) is None
    )


def test_shifted_patches_stand_in_the_table_of_shifted_patches_only() -> None:
    moved = measure(Proportion(4, 10), shift="8", degrees="0")
    assert at(compare(paper_table("table11"), [moved]), WHITE_BOX, 0) is None
    comparison = compare(paper_table("table20"), [moved])
    assert [found and found.value for found in (at(comparison, WHITE_BOX, row) for row in range(4))] == [
        None,
        None,
        0.4,
        None,
    ]


def test_lavan_is_used_if_the_paper_names_no_attack() -> None:
    both = [
        measure(Proportion(1, 10), subject="QADT-R Full"),
        measure(Proportion(9, 10), subject="QADT-R Full", attack="gap"),
    ]
    found, other = (at(compare(paper_table("table13"), some), WHITE_BOX, 3) for some in (both, both[1:]))
    assert found
    assert other
    assert (found.value, other.value) == (0.1, 0.9)


def test_a_table_without_precisions_uses_32_of_float_networks_else_8_or_what_is_given() -> None:
    eps = {"what": "accuracy", "attack": "pgd", "eps": "0.03"}
    floats = [measure(Proportion(n, 10), subject="FP", precision=p, **eps) for n, p in ((1, "32"), (2, "8"))]
    quantized = [
        measure(Proportion(n, 10), subject="QAT", model="q", precision=p, **eps)
        for n, p in ((3, "32"), (4, "8"), (5, "4"))
    ]
    table = paper_table("table07")
    row = compare(table, [*floats, *quantized]).measured[WHITE_BOX][2]
    assert [found and found.value for found in row[:3]] == [0.1, 0.4, None]
    given = compare(table, quantized, {"q": "4"}).measured[WHITE_BOX][2][1]
    assert given
    assert given.value == 0.5


def test_patches_are_told_apart_by_the_precision_they_were_made_at() -> None:
    size = {"subject": "QAT", "size": "8x8"}
    measures = [
        measure(Proportion(1, 10), made_at="same", **size),
        measure(Proportion(6, 10), origins=(), made_at="4", **size),
    ]
    comparison = compare(paper_table("table08"), measures)
    (origin,) = comparison.measured
    assert [found and found.value for found in (at(comparison, origin, row) for row in (0, 2))] == [0.1, 0.6]
    assert any("made at 4 bit" in row[0] for row in comparison_table(comparison).rows if row)


def test_patches_transferred_between_networks_have_rows_of_their_own() -> None:
    found = measure(
        Proportion(3, 10), subject="VGG-19", source="ResNet20", origins=(AT_FLOAT,), **{"from": "another model"}
    )
    comparison = compare(paper_table("table06"), [found])
    ours = at(comparison, AT_FLOAT, 1)
    assert ours
    assert ours.value == 0.3
    assert at(comparison, AT_FLOAT, 3) is None
    assert next(row[0] for row in comparison_table(comparison).rows if row) == "ResNet20 to ResNet56"


@pytest.mark.parametrize("name", ["PBAT [30]", "PBAT (Unseen patch)", "PBAT (Unseen)", "PBAT"])
def test_a_row_gives_the_printed_name_without_brackets(name: str) -> None:
    row = StudyRow(label="x", paper=name)
    assert (row.subject, row.is_unseen) == ("PBAT", "Unseen" in name)


def test_a_row_of_an_unseen_evaluation_is_unseen() -> None:
    assert StudyRow(label="x", paper="QADT-R Full", evaluation="unseen").is_unseen


def test_spelling_of_networks_does_not_matter_but_numbers_do() -> None:
    found = measure(
        Proportion(3, 10), subject="ResNet-56", source="Resnet20", origins=(AT_FLOAT,), **{"from": "another model"}
    )
    ours = at(compare(paper_table("table06"), [found]), AT_FLOAT, 0)
    assert ours
    assert ours.value == 0.3
    eps = {"what": "accuracy", "attack": "pgd", "subject": "QAT"}
    comparison = compare(paper_table("table07"), [measure(Proportion(3, 10), eps="0.015", **eps)])
    assert [at(comparison, WHITE_BOX, row) is not None for row in range(3)] == [False, True, False]


def test_a_comparison_without_measurements_is_empty() -> None:
    assert compare(paper_table("table11"), [measure(Proportion(0, 0))]).is_empty
    assert compare(paper_table("figure01"), [measure(Proportion(1, 2))]).is_empty


def test_values_that_are_no_shares_have_four_decimals() -> None:
    facets = {"kind": "patch", "region": "patch", "subject": "x", "model": "a", "precision": "8"}
    ours = Measurement("cosine", frozenset({AT_FLOAT}), facets, 0.25, None, (0.2, 0.3), 60)
    table = comparison_table(compare(paper_table("figure04"), [ours]))
    lines = {row[1]: row[2] for row in table.rows[:5] if row}
    assert lines == {
        "paper": "0.2842",
        "here": "0.2500",
        "difference": "-0.0342",
        "95 % interval": "0.2000 to 0.3000",
        "n": "60",
    }
