from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from qadtr_brevitas.attacks.pixel import Fgsm, Pgd
from qadtr_brevitas.attacks.sparse_rs import SparseRs
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.reproduce.analyses.pixel import Pixel
from tests.reproduce.analyses.support import analyze, select, shapes


@pytest.mark.slow
def test_accuracy_falls_with_eps_from_the_clean_accuracy(models: list[LoadedModel], tmp_path: Path) -> None:
    report = analyze(Pixel(attacks=(Fgsm(), Pgd(steps=3)), eps=(0.3, 0.0, 0.02)), models, tmp_path, shapes(24))
    for attack in ("fgsm", "pgd"):
        own = select(report, "accuracy", attack=attack, precision="4", made="on the precision attacked")
        assert [record.facets["eps"] for record in own] == [0.0, 0.02, 0.3]
        shares = [record.value for record in own if record.value is not None]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > shares[-1]
    transferred = select(report, "accuracy", attack="pgd", made="at 32 bit")
    assert {(record.precision, record.facets["eps"]) for record in transferred} == {("4", 0.02), ("4", 0.3)}
    assert [picture.file for picture in report.pictures] == ["pixel-fgsm.png", "pixel-pgd.png"]


@pytest.mark.slow
def test_attacks_are_not_transferred_on_request(models: list[LoadedModel], tmp_path: Path) -> None:
    report = analyze(Pixel(attacks=(Fgsm(),), eps=(0.02,), transfer="none"), models, tmp_path)
    assert {record.facets["made"] for record in report.records} == {"on the precision attacked"}


@pytest.mark.slow
def test_attacks_of_one_name_and_other_settings_are_not_averaged(models: list[LoadedModel], tmp_path: Path) -> None:
    both = Pixel(attacks=(Pgd(steps=1, eps=0.5), Pgd(steps=9), Fgsm()), eps=(0.0, 0.02))
    report = analyze(both, models, tmp_path / "both", shapes(24))
    for steps in (1, 9):
        alone = analyze(Pixel(attacks=(Pgd(steps=steps),), eps=both.eps), models, tmp_path / f"{steps}", shapes(24))
        values = [
            [record.value for record in select(part, "accuracy", attack=attack)]
            for part, attack in ((report, f"pgd steps={steps}"), (alone, "pgd"))
        ]
        assert values[0] == values[1]
        assert len(values[0]) == 5
    assert {record.facets["attack"] for record in report.records} == {"pgd steps=1", "pgd steps=9", "fgsm"}
    assert {picture.file for picture in report.pictures} == {
        "pixel-pgd-steps-1.png",
        "pixel-pgd-steps-9.png",
        "pixel-fgsm.png",
    }


def test_an_attack_without_eps_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"'sparse-rs' is not a PixelAttack.*attacks=\[fgsm, pgd\]"):
        Pixel(attacks=(SparseRs(size=2),))  # pyright: ignore[reportArgumentType]
