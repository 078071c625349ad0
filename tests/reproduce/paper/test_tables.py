from __future__ import annotations

import re
from pathlib import Path

import pytest

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.registry import ATTACKS
from qadtr_brevitas.reproduce.paper import PaperTable, paper_table, paper_tables

TABLES = [f"table{number:02d}" for number in (*range(2, 17), *range(18, 22))]
FIGURES = ["figure01", "figure03", "figure04"]


def value(table: str, **where: str) -> float:
    (found,) = [entry.value for entry in paper_table(table).values() if entry.where == where]
    return found


def test_every_table_and_figure_with_results_is_there() -> None:
    assert list(paper_tables()) == [*TABLES, *FIGURES]


@pytest.mark.parametrize("table", paper_tables().values(), ids=lambda table: table.name)
def test_every_number_has_unique_facets(table: PaperTable) -> None:
    entries = list(table.values())
    places = [tuple(sorted(entry.where.items())) for entry in entries]
    assert len(set(places)) == len(places)
    assert all(0 < entry.value < 1 for entry in entries)
    assert not table.where.keys() & {name for entry in entries for name in entry.where}
    attacks = {entry.where.get("attack", table.where.get("attack", "lavan")) for entry in entries}
    assert attacks <= set(ATTACKS.names())


@pytest.mark.parametrize("name", TABLES)
def test_numbers_are_those_of_the_printed_table_in_its_order(name: str, repository: Path) -> None:
    text = repository.parent / "shared" / "paper" / "qadt-r.txt"
    if not text.is_file():
        pytest.skip(f"needs the text of the paper at {text}")
    table = paper_table(name)
    before = text.read_text(encoding="utf-8").partition(f"\n{table.number}.")[0]
    printed = [word for line in before.splitlines() if "\t" in line for word in line.split("\t")]
    numbers = [float(word) for word in printed if re.fullmatch(r"\d+\.\d+", word)]
    ours = [100 * number for _, row in table.rows for number in row if number is not None]
    if name == "table03":
        numbers = [number for number in numbers if number not in (0.1, 0.08, 0.06)]
    if name == "table07":
        numbers = [number for number in numbers if number not in (0.015, 0.03)]
    expected = numbers[-len(ours) :]
    assert ours == pytest.approx(expected)


def test_values_are_found_by_their_facets() -> None:
    assert value("table11", subject="QADT-R", patches="unseen", precision="2") == pytest.approx(0.21)
    assert value("table02", subject="VGG-19", attack="gap", precision="4") == pytest.approx(0.487)
    assert value("table06", source="VGG-16", subject="ResNet56", precision="8") == pytest.approx(0.7893)
    assert value("table20", shift="18", degrees="0", precision="5") == pytest.approx(0.7904)
    assert value("figure04", kind="pixel", region="image", precision="2") == 0.0791


def test_a_table_knows_its_number_and_its_subjects() -> None:
    assert paper_table("table09").number == "Table 9"
    assert paper_table("figure04").number == "Figure 4"
    assert paper_table("table11").subjects() == ["PBAT", "DWQ", "QADT-R"]


def test_a_missing_number_is_left_out() -> None:
    assert len(list(paper_table("figure04").values())) == 4
    assert not list(paper_table("figure01").values())


def test_the_contradictions_noted_are_those_of_the_numbers() -> None:
    falls = [value("table11", subject="QADT-R", patches="seen", precision=p) for p in ("32", "8", "5", "4", "2")]
    rises = [value("table13", subject="QADT-R Full", precision=p) for p in ("32", "8", "5", "4", "2")]
    assert falls == sorted(falls, reverse=True)
    assert rises == sorted(rises)
    gaps = [
        value("table09", subject="Standard QAT", precision=p) - value("table09", subject="QADT-R", precision=p)
        for p in ("32", "8")
    ]
    assert gaps == pytest.approx([0.015, 0.035])
    assert value("table08", subject="QAT-PBAT", size="8x8", made_at="4") - value(
        "table08", subject="QAT-PBAT", size="8x8", made_at="same"
    ) == pytest.approx(0.3086)


def test_an_unknown_table_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"'table22'.*did you mean 'table2"):
        paper_table("table22")
