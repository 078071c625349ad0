"""Recipes made of others: the keys that a layer changes and deletes, and the errors of layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from qadtr_brevitas.config import Recipe, load_recipe, shipped, slot_name
from qadtr_brevitas.config.shipped import copy_recipe
from qadtr_brevitas.core.errors import RecipeError, UsageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped recipes: a network, and two defenses of which the second is made of the first."""
    (tmp_path / "defenses").mkdir()
    write(tmp_path / "net.yaml", "seed: 3\ntrain: {epochs: 7, gradient: gir, attack: {name: a-qapa, steps: 2}}\n")
    write(tmp_path / "defenses" / "pgd.yaml", "train: {attack: {name: pgd, steps: 7}}\n")
    write(tmp_path / "defenses" / "weak.yaml", "base: pgd\ntrain: {attack: {steps: 1}, gradient: null}\n")
    monkeypatch.setattr(shipped, "recipe_folder", lambda: tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def attack(recipe: Recipe) -> tuple[str, int]:
    return slot_name(recipe.train.attack), recipe.train.attack.steps


def test_a_defense_replaces_the_attack_and_keeps_the_rest(folder: Path) -> None:
    recipe = load_recipe("net+pgd")
    assert attack(recipe) == ("pgd", 7)
    assert recipe.train.attack.eps == 0.03
    assert (recipe.seed, recipe.train.epochs, slot_name(recipe.train.gradient)) == (3, 7, "gir")


def test_null_deletes_and_keys_of_the_same_plug_in_are_merged(folder: Path) -> None:
    recipe = load_recipe("net+weak")
    assert attack(recipe) == ("pgd", 1)
    assert recipe.train.gradient is None
    assert attack(load_recipe("net+weak", ["train.attack.steps=4"])) == ("pgd", 4)


def test_a_base_is_found_beside_the_recipe_or_among_the_shipped(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    write(tmp_path / "own" / "first.yaml", "base: net+pgd\nseed: 5\n")
    second = write(tmp_path / "own" / "second.yaml", "base: first.yaml\ntrain: {epochs: 1}\n")
    recipe = load_recipe(second)
    assert (recipe.seed, recipe.train.epochs, attack(recipe)) == (5, 1, ("pgd", 7))


def test_a_file_with_a_plus_in_its_name_is_a_file(folder: Path, tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path / "a+b.yaml", "seed: 9\n")).seed == 9


def test_a_copy_of_several_names_them(folder: Path, tmp_path: Path) -> None:
    copy = copy_recipe("net+weak", tmp_path / "copy.yaml")
    assert load_recipe(copy) == load_recipe("net+weak")
    (tmp_path / "into").mkdir()
    assert copy_recipe("net+weak", tmp_path / "into").name == "net+weak.yaml"


def test_problems_of_a_base_have_the_line_that_names_it(folder: Path, tmp_path: Path) -> None:
    child = write(tmp_path / "child.yaml", "seed: 1\nbase: net\ntrain:\n  epochs: 0\nquant: {precisions: [4]}\n")
    with pytest.raises(RecipeError, match=r"child.yaml:4: train.epochs: .*1, got 0"):
        load_recipe(child)
    write(folder / "net.yaml", "train: {epochs: 0}\n")
    with pytest.raises(RecipeError, match=r"child2.yaml:2: train.epochs: .*1"):
        load_recipe(write(tmp_path / "child2.yaml", "seed: 1\nbase: net\n"))


def test_a_missing_base_is_reported_with_its_line(folder: Path, tmp_path: Path) -> None:
    child = write(tmp_path / "child.yaml", "seed: 1\nbase: nett\n")
    with pytest.raises(RecipeError, match=r"child.yaml:2: base: .*'nett'.*'net'"):
        load_recipe(child)
    with pytest.raises(RecipeError, match=r"child.yaml:1: base: .*name or path"):
        load_recipe(write(child, "base: [net]\n"))


def test_a_circle_of_bases_is_refused(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "one.yaml", "base: two.yaml\n")
    two = write(tmp_path / "two.yaml", "base: one.yaml\n")
    with pytest.raises(RecipeError, match=r"base: .*\.yaml leads back"):
        load_recipe(two)


def test_an_unknown_defense_and_a_defense_alone_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"defense 'pgdd'.*'pgd'"):
        load_recipe("net+pgdd")
    with pytest.raises(UsageError, match=r"weak is a defense.*\+weak"):
        load_recipe("weak")


def test_a_fixed_schedule_trains_the_only_precision_there_is(tmp_path: Path) -> None:
    file = write(tmp_path / "one.yaml", "quant: {precisions: [8]}\ntrain: {precision: fixed}\n")
    assert str(load_recipe(file).train.precision.choice) == "8"
    assert str(load_recipe(file, ["quant.precisions=[w4a8]"]).train.precision.choice) == "w4a8"
    assert str(load_recipe(file, ["quant.precisions=[8,4,2]"]).train.precision.choice) == "4"
