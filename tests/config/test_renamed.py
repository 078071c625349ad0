"""Renamed keys: refused with the new name in recipes, overrides and plug-ins, translated in the record of a run."""

from pathlib import Path

import pytest

from qadtr_brevitas.config import load_recipe, load_recorded_recipe
from qadtr_brevitas.config.renamed import MOVED_KEYS, RENAMED_KEYS, moved_key, renamed_key
from qadtr_brevitas.core.errors import RecipeError

OLD = "seed: 1\ntrain:\n  optimizer:\n    name: adamw\n    threshold_lr: 0.5\n"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(OLD)
    return file


def test_an_old_key_in_a_recipe_is_refused_with_the_new_name_and_its_line(old: Path) -> None:
    with pytest.raises(
        RecipeError, match=r":5: train\.optimizer\.threshold_lr: .*train\.optimizer\.threshold_lr_scale"
    ):
        load_recipe(old)


def test_an_old_key_in_an_override_is_refused_with_the_new_name() -> None:
    with pytest.raises(RecipeError, match=r"command line: .*threshold_lr: .*train\.optimizer\.threshold_lr_scale"):
        load_recipe("digits_smoke", ["train.optimizer.threshold_lr=0.5"])


def test_an_old_key_of_an_attack_is_refused_with_the_new_name(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train: {attack: {name: location-patch, np: 0.08}}\n")
    with pytest.raises(RecipeError, match=r"train\.attack\.np: .*area"):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("train: {attack: {name: location-patch, area: 0.08}}\n")
    assert load_recipe(tmp_path / "recipe.yaml").train.attack.area == 0.08


def test_an_old_key_in_the_record_of_a_run_is_translated(old: Path) -> None:
    assert load_recorded_recipe(old).train.optimizer.threshold_lr_scale == 0.5


def test_a_recorded_recipe_of_this_release_is_read_as_it_is(tmp_path: Path) -> None:
    recipe = load_recipe("digits_smoke+qadtr", ["train.optimizer.threshold_lr_scale=0.25"])
    (tmp_path / "recipe.yaml").write_text(recipe.dump_yaml())
    assert load_recorded_recipe(tmp_path / "recipe.yaml") == recipe


def test_a_recorded_recipe_with_an_unknown_plug_in_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train: {attack: {name: lavn}}\n")
    with pytest.raises(RecipeError, match=r"train\.attack\.name: .*'lavn'.*'lavan'"):
        load_recorded_recipe(tmp_path / "recipe.yaml")


def test_an_old_name_counts_only_where_the_new_one_exists() -> None:
    for old, new in RENAMED_KEYS.items():
        assert renamed_key(old, {new}) == new
        assert renamed_key(old, {"other"}) is None
        assert renamed_key(new, {new}) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [("percentile: 99.5", "method.percentile"), ("bias_correction: true", "weights=[bias-correction]")],
)
def test_a_key_that_moved_is_refused_with_what_to_write(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"quant:\n  calibration:\n    {old}\n")
    key = old.partition(":")[0]
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert f":3: quant.calibration.{key}: " in str(caught.value)
    assert f"quant.calibration.{new}" in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits_smoke", [f"quant.calibration.{old.replace(': ', '=')}"])
    assert f"quant.calibration.{new}" in str(caught.value)


@pytest.mark.parametrize(
    ("recorded", "present"),
    [
        ("{method: mse, percentile: 99.5, bias_correction: false}", "{method: mse}"),
        (
            "{method: percentile, percentile: 99.5, samples: 32, bias_correction: true}",
            "{method: {name: percentile, percentile: 99.5}, samples: 32, weights: [bias-correction]}",
        ),
    ],
)
def test_moved_keys_in_the_record_of_a_run_are_translated(tmp_path: Path, recorded: str, present: str) -> None:
    for name, text in (("old", recorded), ("new", present)):
        (tmp_path / f"{name}.yaml").write_text(f"quant:\n  calibration: {text}\n")
    assert load_recorded_recipe(tmp_path / "old.yaml") == load_recipe(tmp_path / "new.yaml")


def test_a_moved_key_counts_only_where_its_new_place_exists() -> None:
    for (old, home), new in MOVED_KEYS.items():
        assert moved_key(old, {home}) == new
        assert moved_key(old, {"other"}) is None
        assert moved_key(old, {home, old}) is None


@pytest.mark.parametrize(
    ("recorded", "forced"),
    [
        ("{rand_augment: rand-m9, color_jitter: 0.3}", True),
        ("{rand_augment: null, color_jitter: 0.3}", False),
        ("{rand_augment: rand-m9, color_jitter: 0.0}", False),
    ],
)
def test_runs_of_earlier_releases_had_color_jitter_beside_rand_augment(
    tmp_path: Path, recorded: str, forced: bool
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"data:\n  transform: {recorded}\n")
    transform = load_recorded_recipe(file).data.transform
    assert transform is not None
    assert transform.force_color_jitter is forced
