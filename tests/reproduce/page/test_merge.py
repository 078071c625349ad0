from __future__ import annotations

from pathlib import Path

from qadtr_brevitas.evaluation import evaluate
from qadtr_brevitas.evaluation.report.summaries import tables
from qadtr_brevitas.evaluation.report.views import families
from qadtr_brevitas.evaluation.variants import PatchVariants
from qadtr_brevitas.reproduce.page.merge import merge_reports
from tests.evaluation.fakes import make_grid, reader, white_patch
from tests.reproduce.page.support import make_report


def test_merged_models_keep_their_numbers(tmp_path: Path) -> None:
    reports = [make_report(tmp_path / name, names=(name,)) for name in ("a", "b")]
    merged = merge_reports(reports)
    assert [model.name for model in merged.models] == ["a", "b"]
    assert len(merged.cells) == sum(len(report.cells) for report in reports)
    assert [cell.asr for cell in merged.cells] == [cell.asr for report in reports for cell in report.cells]
    # The patch of noise is the same in both.
    assert sum(patch.control for patch in merged.patches) == 1
    assert tables(merged)


def test_different_patches_of_one_name_get_names_of_their_own(tmp_path: Path) -> None:
    reports = [
        evaluate(make_grid([reader(name)], [white_patch("white", model=name, side=side)]), output=tmp_path / name)
        for name, side in (("a", 2), ("b", 3))
    ]
    merged = merge_reports(reports)
    facts = merged.attack_facts()
    assert [patch.name for patch in merged.patches if not patch.control] == ["white", "white (2)"]
    sizes = {cell.model: facts[cell.attack].family for cell in merged.cells if cell.threat != "control"}
    assert sizes == {"a": "lavan 2x2", "b": "lavan 3x3"}


def test_patches_of_other_settings_are_told_apart_over_all_reports(tmp_path: Path) -> None:
    reports = []
    for name, init in (("a", "image"), ("b", "uniform")):
        patch = white_patch("white", model=name)
        patch.patch.meta["settings"] = {"init": init}
        reports.append(evaluate(make_grid([reader(name)], [patch]), output=tmp_path / name))
    assert {family for report in reports for family in families(report)} == {"lavan 2x2"}
    assert set(families(merge_reports(reports))) == {"lavan 2x2 init=image", "lavan 2x2 init=uniform"}


def test_variants_follow_their_patch(tmp_path: Path) -> None:
    reports = []
    for name, side in (("a", 2), ("b", 3)):
        patch = white_patch("white", model=name, side=side)
        moved = PatchVariants(at=(1, 1)).variants([patch], (8, 8))
        reports.append(evaluate(make_grid([reader(name)], [patch, *moved]), output=tmp_path / name))
    found = {patch.name: patch.variant.of for patch in merge_reports(reports).patches if patch.variant}
    assert sorted(found.values()) == ["white", "white (2)"]
