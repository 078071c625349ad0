"""An analysis that is asked for again: kept where nothing has changed, measured anew where something has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qadtr_brevitas.attacks.pixel import Fgsm
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.reproduce.analyses import AnalysisData
from qadtr_brevitas.reproduce.analyses.features import Features
from qadtr_brevitas.reproduce.analyses.pixel import Pixel
from tests.evaluation.models import train_split
from tests.reproduce.analyses.support import LAVAN, analyze, make_subjects, patch_folder, shapes

FAST = Features(attack=LAVAN, images=6)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedModel]:
    return make_subjects(tmp_path_factory.mktemp("models"))


def test_patches_of_other_settings_are_made_beside_and_kept(subjects: list[LoadedModel], tmp_path: Path) -> None:
    first = analyze(FAST, subjects, tmp_path)
    (patch,) = patch_folder(tmp_path).glob("*.safetensors")
    made = patch.stat().st_mtime_ns
    other = analyze(replace(FAST, attack=replace(LAVAN, steps=5)), subjects, tmp_path)
    assert other.records != first.records
    assert len(list(tmp_path.glob("patches/net0/*"))) == 2
    assert analyze(FAST, subjects, tmp_path).records == first.records
    assert patch.stat().st_mtime_ns == made


def test_finished_patches_that_were_remade_are_measured_again(subjects: list[LoadedModel], tmp_path: Path) -> None:
    for steps in (1, 8):
        analyze(replace(FAST, attack=replace(LAVAN, steps=steps)), subjects, tmp_path / f"{steps}")
    (old,), (new,) = (list(patch_folder(tmp_path / f"{steps}").glob("*.safetensors")) for steps in (1, 8))
    given = replace(FAST, patches=(str(old.parent),))
    first = analyze(given, subjects, tmp_path / "given")
    assert analyze(given, subjects, tmp_path / "given") == first
    old.write_bytes(new.read_bytes())
    again = analyze(given, subjects, tmp_path / "given")
    assert again.records != first.records
    assert again.train is None


def test_other_training_images_make_other_patches(subjects: list[LoadedModel], tmp_path: Path) -> None:
    first = analyze(FAST, subjects, tmp_path)
    assert first.train
    assert analyze(FAST, subjects, tmp_path) == first
    fewer = AnalysisData("shapes", shapes().test, load_train=lambda: train_split().limited(30, seed=0))
    other = analyze(FAST, subjects, tmp_path, fewer)
    assert other.train not in (None, first.train)
    assert other.records != first.records
    # Without training images nothing says that they are others.
    assert analyze(FAST, subjects, tmp_path, AnalysisData("shapes", shapes().test)) == other


def test_training_images_are_loaded_once_and_only_for_patches(tmp_path: Path) -> None:
    several = make_subjects(tmp_path / "models", count=2)
    loaded: list[int] = []

    def load() -> Split:
        loaded.append(1)
        return train_split()

    data = AnalysisData("shapes", shapes().test, load_train=load)
    analyze(FAST, several, tmp_path / "features", data)
    assert loaded == [1]
    pixel = Pixel(attacks=(Fgsm(),), eps=(0.1,))
    first = analyze(pixel, several[:1], tmp_path / "pixel", data)
    assert analyze(pixel, several[:1], tmp_path / "pixel", data) == first
    assert first.train is None
    assert loaded == [1]
