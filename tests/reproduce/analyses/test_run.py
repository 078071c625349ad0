"""Running an analysis again: results are kept while their inputs stay the same, and made again when they change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qadtr_brevitas.attacks.pixel import Fgsm
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.reproduce.analyses import AnalysisData
from qadtr_brevitas.reproduce.analyses.features import Features
from qadtr_brevitas.reproduce.analyses.pixel import Pixel
from tests.evaluation.models import train_split
from tests.reproduce.analyses.support import LAVAN, analyze, make_models, patch_folder, shapes

pytestmark = pytest.mark.slow

FAST = Features(attack=LAVAN, images=6)


def test_an_analysis_of_the_same_inputs_is_kept(models: list[LoadedModel], tmp_path: Path) -> None:
    first = analyze(FAST, models, tmp_path)
    before = (tmp_path / "analysis.json").stat().st_mtime_ns
    assert analyze(FAST, models, tmp_path) == first
    assert (tmp_path / "analysis.json").stat().st_mtime_ns == before


def test_patches_of_other_settings_are_kept_side_by_side(models: list[LoadedModel], tmp_path: Path) -> None:
    first = analyze(FAST, models, tmp_path)
    (patch,) = patch_folder(tmp_path).glob("*.safetensors")
    made = patch.stat().st_mtime_ns
    other = analyze(replace(FAST, attack=replace(LAVAN, steps=5)), models, tmp_path)
    assert other.records != first.records
    assert len(list(tmp_path.glob("patches/net0/*"))) == 2
    assert analyze(FAST, models, tmp_path).records == first.records
    assert patch.stat().st_mtime_ns == made


def test_finished_patches_with_new_contents_are_measured_again(models: list[LoadedModel], tmp_path: Path) -> None:
    for steps in (1, 8):
        analyze(replace(FAST, attack=replace(LAVAN, steps=steps)), models, tmp_path / f"{steps}")
    (old,), (new,) = (list(patch_folder(tmp_path / f"{steps}").glob("*.safetensors")) for steps in (1, 8))
    given = replace(FAST, patches=(str(old.parent),))
    first = analyze(given, models, tmp_path / "given")
    assert analyze(given, models, tmp_path / "given") == first
    old.write_bytes(new.read_bytes())
    again = analyze(given, models, tmp_path / "given")
    assert again.records != first.records
    assert again.train is None


def test_other_training_images_give_other_patches(models: list[LoadedModel], tmp_path: Path) -> None:
    first = analyze(FAST, models, tmp_path)
    assert first.train
    assert analyze(FAST, models, tmp_path) == first
    fewer = AnalysisData("shapes", shapes().test, load_train=lambda: train_split().limited(30, seed=0))
    other = analyze(FAST, models, tmp_path, fewer)
    assert other.train not in (None, first.train)
    assert other.records != first.records
    # Without training images there is nothing to compare the recorded ones with.
    assert analyze(FAST, models, tmp_path, AnalysisData("shapes", shapes().test)) == other


def test_training_images_are_loaded_once_and_only_for_patches(tmp_path: Path) -> None:
    several = make_models(tmp_path / "models", count=2)
    loads: list[int] = []

    def load() -> Split:
        loads.append(1)
        return train_split()

    data = AnalysisData("shapes", shapes().test, load_train=load)
    analyze(FAST, several, tmp_path / "features", data)
    assert loads == [1]
    pixel = Pixel(attacks=(Fgsm(),), eps=(0.1,))
    first = analyze(pixel, several[:1], tmp_path / "pixel", data)
    assert analyze(pixel, several[:1], tmp_path / "pixel", data) == first
    assert first.train is None
    assert loads == [1]


def test_patches_must_be_given_without_training_images(models: list[LoadedModel], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no training images.*patches="):
        analyze(FAST, models, tmp_path, AnalysisData("shapes", shapes().test))


def test_an_analysis_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a model"):
        analyze(FAST, [], tmp_path)
