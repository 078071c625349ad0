"""Analyses that score patches and attacks: places, sizes, distances."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qadtr_brevitas.attacks.pixel import Fgsm, Pgd
from qadtr_brevitas.attacks.sparse_rs import SparseRs
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.reproduce.analyses.base import Record
from qadtr_brevitas.reproduce.analyses.charts import Curve, draw_records
from qadtr_brevitas.reproduce.analyses.pixel import Pixel
from qadtr_brevitas.reproduce.analyses.size import Size
from qadtr_brevitas.reproduce.analyses.spatial import Spatial
from tests.reproduce.analyses.support import LAVAN, analyze, make_subjects, patch_folder, shapes, values

SPATIAL = Spatial(attack=LAVAN, targets=(0,), at=(1, 2), shifts=(3, 8), degrees=(20,))


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedModel]:
    return make_subjects(tmp_path_factory.mktemp("models"))


def test_every_move_is_scored_at_every_precision(subjects: list[LoadedModel], tmp_path: Path) -> None:
    report = analyze(SPATIAL, subjects, tmp_path)
    moves = [
        (r.facets["scored"], r.facets.get("shift"), r.facets.get("degrees"))
        for r in values(report, "asr", precision="4")
    ]
    assert moves == [
        ("at random places", None, None),
        ("at 1,2", 0, 0),
        ("shifted by 3", 3, 0),
        ("shifted by 8", 8, 0),
        ("rotated by 20 deg", 0, 20),
    ]
    assert {record.precision for record in report.records} == {"32", "4"}
    assert values(report, "asr of a random patch", scored="at random places")
    assert [picture.file for picture in report.pictures] == ["shifts.png", "turns.png"]


def test_figures_are_those_of_the_evaluation(subjects: list[LoadedModel], tmp_path: Path) -> None:
    report = analyze(SPATIAL, subjects, tmp_path)
    for record in values(report, "asr"):
        assert record.n
        assert record.value is not None
        assert record.low is not None
        assert record.high is not None
        assert record.low <= record.value <= record.high
        assert (record.value * record.n) == pytest.approx(round(record.value * record.n))


def test_finished_cells_are_not_computed_again(
    subjects: list[LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = analyze(SPATIAL, subjects, tmp_path)
    (tmp_path / "analysis.json").unlink()
    monkeypatch.setattr("qadtr_brevitas.evaluation.jobs.predict", None)
    again = analyze(SPATIAL, subjects, tmp_path)
    assert again.records == first.records


def test_a_shift_off_the_image_is_refused(subjects: list[LoadedModel], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be shifted by 18 pixels, it would leave the 16x16 image"):
        analyze(Spatial(attack=LAVAN, targets=(0,)), subjects, tmp_path)


def test_every_size_has_patches_of_its_own(subjects: list[LoadedModel], tmp_path: Path) -> None:
    report = analyze(Size(attack=LAVAN, sizes=(3, 6), targets=(0, 1)), subjects, tmp_path)
    found = values(report, "asr", precision="4")
    assert [(record.facets["size"], record.facets["attack"]) for record in found] == [
        ("3x3", "lavan"),
        ("6x6", "lavan"),
    ]
    assert len(values(report, "asr of a random patch")) == 2 * 2
    made = sorted(path.name for path in patch_folder(tmp_path).glob("*.safetensors"))
    assert made == [f"lavan-{size}-32bit-target{target}.safetensors" for size in ("3x3", "6x6") for target in (0, 1)]


def test_finished_patches_of_several_sizes_are_not_averaged(subjects: list[LoadedModel], tmp_path: Path) -> None:
    analyze(Size(attack=LAVAN, sizes=(3, 4), targets=(0, 1)), subjects, tmp_path / "made")
    given = replace(SPATIAL, patches=(str(patch_folder(tmp_path / "made")),), shifts=(3,), degrees=(45,))
    report = analyze(given, subjects, tmp_path / "spatial")
    # A line for each size, whatever size a turned patch is; each a mean over the two targets.
    scored = ["at random places", "at 1,2", "shifted by 3", "rotated by 45 deg"]
    found = values(report, "asr", precision="4")
    assert sorted((r.facets["attack"], r.facets["scored"]) for r in found) == sorted(
        (size, word) for size in ("lavan 3x3", "lavan 4x4") for word in scored
    )
    random = values(report, "asr of a random patch", precision="4", scored="at random places")
    assert [record.facets["size"] for record in random] == ["3x3", "4x4"]


def test_patches_of_other_settings_have_a_line_of_their_own(subjects: list[LoadedModel], tmp_path: Path) -> None:
    for steps in (1, 2):
        analyze(Size(attack=replace(LAVAN, steps=steps), sizes=(4,), targets=(0,)), subjects, tmp_path / f"{steps}")
    patches = tuple(str(patch_folder(tmp_path / f"{steps}")) for steps in (1, 2))
    report = analyze(Size(patches=patches), subjects, tmp_path / "size")
    found = values(report, "asr", precision="4")
    assert [record.facets["attack"] for record in found] == ["lavan steps=1", "lavan steps=2"]


def test_every_attack_has_a_curve_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Curve] = []
    monkeypatch.setattr(
        "qadtr_brevitas.reproduce.analyses.charts.draw_curves", lambda curves, *rest, **more: drawn.extend(curves)
    )

    def draw(*attacks: str) -> list[tuple[str, int]]:
        drawn.clear()
        records = [
            Record(model="a", precision="4", what="asr", value=0.1 * number, facets={"attack": attack, "size": size})
            for number, attack in enumerate(attacks)
            for size in ("3x3", "4x4")
        ]
        draw_records(records, tmp_path / "x.png", along="size", x_label="", y_label="")
        return [(curve.label, len(curve.points)) for curve in drawn]

    assert draw("lavan") == [("a at 4 bit", 2)]
    assert draw("lavan", "gap") == [("a at 4 bit, lavan", 2), ("a at 4 bit, gap", 2)]


def test_an_attack_without_a_single_size_is_refused(subjects: list[LoadedModel], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fgsm has no single size to change"):
        analyze(Size(attack=Fgsm()), subjects, tmp_path)


def test_accuracy_falls_with_eps_from_the_clean_one(subjects: list[LoadedModel], tmp_path: Path) -> None:
    report = analyze(Pixel(attacks=(Fgsm(), Pgd(steps=3)), eps=(0.3, 0.0, 0.02)), subjects, tmp_path, shapes(24))
    for attack in ("fgsm", "pgd"):
        own = values(report, "accuracy", attack=attack, precision="4", made="on the precision attacked")
        assert [record.facets["eps"] for record in own] == [0.0, 0.02, 0.3]
        shares = [record.value for record in own if record.value is not None]
        assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    moved = values(report, "accuracy", attack="pgd", made="at 32 bit")
    assert {(record.precision, record.facets["eps"]) for record in moved} == {("4", 0.02), ("4", 0.3)}
    assert [picture.file for picture in report.pictures] == ["pixel-fgsm.png", "pixel-pgd.png"]


def test_attacks_on_the_precision_attacked_only(subjects: list[LoadedModel], tmp_path: Path) -> None:
    report = analyze(Pixel(attacks=(Fgsm(),), eps=(0.02,), transfer="none"), subjects, tmp_path)
    assert {record.facets["made"] for record in report.records} == {"on the precision attacked"}


def test_attacks_of_one_name_and_other_settings_are_not_averaged(subjects: list[LoadedModel], tmp_path: Path) -> None:
    both = Pixel(attacks=(Pgd(steps=1, eps=0.5), Pgd(steps=9), Fgsm()), eps=(0.0, 0.02))
    report = analyze(both, subjects, tmp_path / "both", shapes(24))
    for steps in (1, 9):
        alone = analyze(Pixel(attacks=(Pgd(steps=steps),), eps=both.eps), subjects, tmp_path / f"{steps}", shapes(24))
        figures = [
            [r.value for r in values(part, "accuracy", attack=attack)]
            for part, attack in ((report, f"pgd steps={steps}"), (alone, "pgd"))
        ]
        assert figures[0] == figures[1]
        assert len(figures[0]) == 5
    assert {record.facets["attack"] for record in report.records} == {"pgd steps=1", "pgd steps=9", "fgsm"}
    assert {picture.file for picture in report.pictures} == {
        "pixel-pgd-steps-1.png",
        "pixel-pgd-steps-9.png",
        "pixel-fgsm.png",
    }


def test_an_attack_without_eps_is_refused(subjects: list[LoadedModel], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sparse-rs has no eps to change: choose pixel attacks"):
        analyze(Pixel(attacks=(SparseRs(size=2),)), subjects, tmp_path)
