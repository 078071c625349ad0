from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.reproduce.analyses.size import Size
from qadtr_brevitas.reproduce.analyses.spatial import Spatial
from tests.reproduce.analyses.support import LAVAN, analyze, patch_folder, select

pytestmark = pytest.mark.slow

SPATIAL = Spatial(attack=LAVAN, targets=(0,), at=(1, 2), shifts=(3, 8), degrees=(20,))


def test_every_variant_is_scored_at_every_precision(models: list[LoadedModel], tmp_path: Path) -> None:
    report = analyze(SPATIAL, models, tmp_path)
    variants = [
        (record.facets["scored"], record.facets.get("shift"), record.facets.get("degrees"))
        for record in select(report, "asr", precision="4")
    ]
    assert variants == [
        ("at random places", None, None),
        ("at 1,2", 0, 0),
        ("shifted by 3", 3, 0),
        ("shifted by 8", 8, 0),
        ("rotated by 20 deg", 0, 20),
    ]
    assert {record.precision for record in report.records} == {"32", "4"}
    assert select(report, "asr of a random patch", scored="at random places")
    assert [picture.file for picture in report.pictures] == ["shifts.png", "turns.png"]
    for record in select(report, "asr"):
        assert record.n
        assert record.value is not None
        assert record.low is not None
        assert record.high is not None
        assert record.low <= record.value <= record.high
        # One target: the share is a count of images.
        assert (record.value * record.n) == pytest.approx(round(record.value * record.n))


def test_finished_cells_are_not_computed_again(
    models: list[LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = analyze(SPATIAL, models, tmp_path)
    (tmp_path / "analysis.json").unlink()
    monkeypatch.setattr("qadtr_brevitas.evaluation.jobs.predict", None)
    again = analyze(SPATIAL, models, tmp_path)
    assert again.records == first.records


def test_a_shift_off_the_image_is_refused(models: list[LoadedModel], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"18 pixels.*16x16"):
        analyze(Spatial(attack=LAVAN, targets=(0,)), models, tmp_path)


def test_finished_patches_of_several_sizes_are_not_averaged(models: list[LoadedModel], tmp_path: Path) -> None:
    analyze(Size(attack=LAVAN, sizes=(3, 4), targets=(0, 1)), models, tmp_path / "made")
    given = replace(SPATIAL, patches=(str(patch_folder(tmp_path / "made")),), shifts=(3,), degrees=(45,))
    report = analyze(given, models, tmp_path / "spatial")
    # A line for each size, whatever the size of a rotated patch; each is a mean over the two targets.
    scored = ["at random places", "at 1,2", "shifted by 3", "rotated by 45 deg"]
    found = select(report, "asr", precision="4")
    assert sorted((record.facets["attack"], record.facets["scored"]) for record in found) == sorted(
        (size, place) for size in ("lavan 3x3", "lavan 4x4") for place in scored
    )
    random = select(report, "asr of a random patch", precision="4", scored="at random places")
    assert [record.facets["size"] for record in random] == ["3x3", "4x4"]
