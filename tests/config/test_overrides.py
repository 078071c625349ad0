"""Overrides: `key.sub=value` passes the same checks as the file, and errors call its place `command line`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qadtr_brevitas.config import Recipe, load_recipe, slot_name
from qadtr_brevitas.core.errors import RecipeError

TEXT = (
    "seed: 1\n"
    "train:\n"
    "  epochs: 3\n"
    "  attack: a-qapa\n"
    "  regularizers:\n"
    "  - {name: distillation, weight: 0.5}\n"
    "  - distillation\n"
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(TEXT)
    return path


def only_problem(file: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].line is None
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=5", lambda recipe: recipe.seed == 5),
        (" seed = 5 ", lambda recipe: recipe.seed == 5),
        ("train.optimizer.lr=1e-3", lambda recipe: recipe.train.optimizer.lr == 0.001),
        ("train.optimizer={name: adamw, lr: 0.1}", lambda recipe: recipe.train.optimizer.name == "adamw"),
        ("train.amp=no", lambda recipe: recipe.train.amp == "no"),
        ("quant.precisions=[32,8,5,4,2,w4a8]", lambda recipe: len(recipe.quant.precisions) == 6),
        ("model.args.drop_rate=0.1", lambda recipe: recipe.model.args == {"drop_rate": 0.1}),
        ("model.args={a: {b: 1}}", lambda recipe: recipe.model.args == {"a": {"b": 1}}),
        ("model.checkpoint=a=b.pth", lambda recipe: recipe.model.checkpoint == "a=b.pth"),
        ("train.attack.steps=2", lambda recipe: recipe.train.attack.steps == 2),
        ("train.attack=null", lambda recipe: recipe.train.attack is None),
        ("train.attack={name: a-qapa, steps: 4}", lambda recipe: recipe.train.attack.steps == 4),
        ("train.gradient=gir", lambda recipe: slot_name(recipe.train.gradient) == "gir"),
        ("train.epochs=null", lambda recipe: recipe.train.epochs == 15),
        ("train.epochs=", lambda recipe: recipe.train.epochs == 15),
        ("train.regularizers.1.weight=2", lambda recipe: recipe.train.regularizers[1].weight == 2),
        ("train.regularizers.0=null", lambda recipe: len(recipe.train.regularizers) == 1),
        ("train.regularizers.2=distillation", lambda recipe: len(recipe.train.regularizers) == 3),
        ("train.regularizers=[]", lambda recipe: recipe.train.regularizers == ()),
        ("data.dataset=digits", lambda recipe: slot_name(recipe.data.dataset) == "digits"),
        ("data.dataset.root=/x", lambda recipe: str(recipe.data.dataset.root) == "/x"),
        ("train.precision.choices=[8,4]", lambda recipe: len(recipe.train.precision.choices) == 2),
    ],
)
def test_overrides(file: Path, override: str, value) -> None:
    assert value(load_recipe(file, [override]))


def test_later_overrides_win(file: Path) -> None:
    assert load_recipe(file, ["seed=2", "seed=3"]).seed == 3


def test_removing_an_item_moves_the_others_up(file: Path) -> None:
    recipe = load_recipe(file, ["train.regularizers.0=null", "train.regularizers.0.weight=3"])
    assert [regularizer.weight for regularizer in recipe.train.regularizers] == [3]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("epochs=3", "command line: epochs: unknown key: did you mean 'train.epochs'?"),
        ("train.epoch=3", "command line: train.epoch: unknown key: did you mean 'train.epochs'?"),
        ("tran.epochs=3", "command line: tran.epochs: unknown key: did you mean 'train.epochs'?"),
        ("zzz=3", "command line: zzz: unknown key: choose from data, model, quant, seed, train"),
        ("train.epochs=0", "command line: train.epochs: must be at least 1, got 0"),
        ("train.attack.stepz=1", "command line: train.attack.stepz: unknown key 'stepz': did you mean 'steps'?"),
        ("train.gradient.alpha=1", "command line: train.gradient.name: must name a gradient rule"),
        ("train.epochs.x=1", "command line: train.epochs.x: train.epochs is a single value"),
        ("train.regularizers.7=distillation", "train.regularizers has 2 items: use an index from 0, or 2 to"),
        ("train.regularizers.x=distillation", "train.regularizers has 2 items"),
        ("train.regularizers.1.weight=x", "command line: train.regularizers.1.weight: must be a number, got 'x'"),
        ("seed", "command line: seed: is not an override: write key=value"),
        ("=3", "command line: =3: is not an override"),
        ("seed={", "command line: seed: the value '{' is not YAML"),
        ("seed={a: 1, a: 2}", "key 'a' is given twice"),
        ("train=3", "command line: train: must be a mapping of keys to values, got 3"),
        ("train..epochs=3", "command line: train..epochs: unknown key"),
    ],
)
def test_wrong_overrides(file: Path, override: str, words: str) -> None:
    assert words in only_problem(file, override)


def test_keys_of_the_file_keep_their_lines(file: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["train.scheduler.warmup_epochs=1", "train.attack.share=7", "quant.precisions=[3]"])
    assert {problem.path: problem.line for problem in caught.value.problems} == {"train.attack.share": None}


@pytest.mark.slow
@settings(max_examples=30)
@given(
    lr=st.floats(1e-12, 1e3),
    momentum=st.floats(0, 0.999),
    seed=st.integers(0, 2**62),
    name=st.text("abc: #'", min_size=1),
)
def test_a_dumped_recipe_and_its_values_can_be_given_again(
    tmp_path_factory, lr: float, momentum: float, seed: int, name: str
) -> None:
    recipe = Recipe.model_validate(
        {"seed": seed, "model": {"name": name}, "train": {"optimizer": {"lr": lr, "momentum": momentum}}}
    )
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(recipe.dump_yaml())
    assert load_recipe(path) == recipe
    assert load_recipe(path, [f"train.optimizer.lr={lr!r}", f"seed={seed}"]) == recipe
