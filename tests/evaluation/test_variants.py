from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.core.table import Table
from qadtr_brevitas.evaluation import evaluate
from qadtr_brevitas.evaluation.entries import NamedPatch
from qadtr_brevitas.evaluation.report import EvaluationReport
from qadtr_brevitas.evaluation.report.csv_tables import cells_csv
from qadtr_brevitas.evaluation.report.markdown import markdown
from qadtr_brevitas.evaluation.report.summaries import tables
from qadtr_brevitas.evaluation.report.views import families
from qadtr_brevitas.evaluation.variants import PatchVariants
from tests.evaluation.fakes import make_grid, reader, white_patch

IMAGE = (8, 8)


def moved(moves: PatchVariants, patch: NamedPatch | None = None) -> dict[str, NamedPatch]:
    patch = patch or white_patch()
    return {variant.facts.variant.label: variant for variant in moves.variants([patch], IMAGE)}


def test_fixed_place_and_shifts_from_there() -> None:
    found = moved(PatchVariants(at=(1, 2), shifts=[3, 4]))
    assert {label: variant.patch.place for label, variant in found.items()} == {
        "at 1,2": (1, 2),
        "at 1,2 shifted by 3": (4, 5),
        "at 1,2 shifted by 4": (5, 6),
    }
    assert [variant.name for variant in found.values()][1] == "white at 1,2 shifted by 3"
    assert torch.equal(found["at 1,2"].patch.texture, white_patch().patch.texture)


def test_patch_with_a_place_of_its_own_is_shifted_from_it() -> None:
    placed = white_patch(place=(2, 2))
    assert moved(PatchVariants(shifts=[1]), placed)["shifted by 1"].patch.place == (3, 3)
    assert moved(PatchVariants(at=(2, 2)), placed) == {}


def test_shift_that_leaves_the_image_is_refused_with_the_largest_that_does_not() -> None:
    with pytest.raises(UsageError, match=r"'white' at row 1, column 3 .*by 4 .*8x8.*--shift up to 3"):
        moved(PatchVariants(at=(1, 3), shifts=[3, 4]))
    with pytest.raises(UsageError, match=r"'white' .*--at ROW,COL"):
        moved(PatchVariants(shifts=[1]))


def test_rotation_turns_about_the_middle_and_stays_on_the_grid_and_in_the_image() -> None:
    texture = torch.randint(256, (3, 4, 2)) / 255
    patch = NamedPatch("tall", Patch(texture=texture, mask=torch.ones(4, 2, dtype=torch.bool)))
    turned = moved(PatchVariants(at=(2, 3), degrees=[90]), patch)["at 2,3 rotated by 90 deg"].patch
    assert (turned.size, turned.place) == ((2, 4), (3, 2))
    assert torch.equal(turned.texture, texture.rot90(1, (1, 2)))
    in_corner = moved(PatchVariants(at=(0, 0), degrees=[45]), white_patch(side=5))["at 0,0 rotated by 45 deg"].patch
    assert in_corner.place == (0, 0)
    assert in_corner.size == (7, 7)
    assert in_corner.pixels == 25
    assert torch.allclose(in_corner.texture * 255, (in_corner.texture * 255).round(), atol=1e-4)
    anywhere = moved(PatchVariants(degrees=[30.0]), white_patch(side=4))["rotated by 30 deg"].patch
    assert anywhere.place == "random"


@pytest.mark.parametrize("side", [3, 4])
def test_small_turn_leaves_a_textured_patch_where_and_as_it_is(side: int) -> None:
    texture = torch.randint(256, (3, side, side), generator=generator(0)) / 255
    patch = NamedPatch("textured", Patch(texture=texture, mask=torch.ones(side, side, dtype=torch.bool)))
    turned = moved(PatchVariants(at=(2, 3), degrees=[0.01]), patch)["at 2,3 rotated by 0.01 deg"].patch
    assert turned.place == (2, 3)
    assert (turned.texture - texture).abs().max() <= 1.01 / 255


def report_of(tmp_path: Path) -> EvaluationReport:
    patches = [white_patch(f"{bits}-{side}", side=side, precision=bits) for side in (2, 3) for bits in (8, 4)]
    variants = PatchVariants(at=(1, 1), shifts=[4], degrees=[90.0]).variants(patches, IMAGE)
    return evaluate(make_grid([reader()], [*patches, *variants]), output=tmp_path)


def find(report: EvaluationReport, title: str) -> Table:
    return next(table for table in tables(report) if title in table.title)


def test_variants_have_a_table_of_their_own_and_enter_no_mean(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    assert families(report) == ["lavan 2x2", "lavan 3x3"]
    table = find(report, "lavan 2x2: ASR on reader of moved and turned patches")
    rows = [list(row) for row in table.rows if row]
    labels = ["as made", "at 1,1", "at 1,1 shifted by 4", "at 1,1 rotated by 90 deg"]
    assert [row[:2] for row in rows[:4]] == [
        ["white-box" if not index else "", name] for index, name in enumerate(labels)
    ]
    assert rows[0][2:] == ["100.0", "100.0"]
    assert [row[0] for row in rows[4:] if row[0]] == ["random patch", "n of ASR"]
    assert rows[-1] == ["n of ASR", "", "30", "30"]
    white_box = find(report, "lavan 2x2: each precision")
    numbers = next(row for row in white_box.rows if row and row[1] == "number of attacks")
    assert numbers[2:] == ("1", "1")
    assert {case.attacks for case in report.worst_case if case.scope == "all"} == {4}
    assert "| 8-2 at 1,1 | lavan | 2 | 2x2 | reader | 8 | at 1,1 |" in markdown(report)
    assert 'reader,8,8-2 at 1,1,lavan 2x2,"at 1,1"' in cells_csv(report).replace('"8-2 at 1,1"', "8-2 at 1,1")


def test_variants_of_variants_have_controls_at_the_same_place(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    geometries = {patch.geometry for patch in report.patches if not patch.control}
    assert {patch.geometry for patch in report.patches if patch.control} == geometries
