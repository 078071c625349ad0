"""Reading and checking recipes: all problems are reported at once, each with its key, line and advice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qadtr_brevitas.attacks.a_qapa import AQapa
from qadtr_brevitas.config import Recipe, load_recipe, slot_name
from qadtr_brevitas.core.errors import RecipeError, UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.training.schedules import Cycle, Sandwich, Uniform


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file

    return write


def problems(file: Path, *overrides: str) -> dict[str, tuple[int | None, str]]:
    """The line and message of every problem, by key."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    return {problem.path: (problem.line, problem.message) for problem in caught.value.problems}


def test_every_key_has_a_default(write) -> None:
    recipe = load_recipe(write("seed: 3\n"))
    assert recipe.seed == 3
    assert recipe.model.name == "cifar_resnet20"
    assert [str(p) for p in recipe.quant.precisions] == ["32", "8", "5", "4", "2"]
    assert slot_name(recipe.data.dataset) == "cifar10"
    assert isinstance(recipe.train.precision, Uniform)
    assert recipe.train.attack is None
    assert recipe.train.regularizers == ()
    assert recipe == Recipe(seed=3)


def test_all_problems_are_reported_at_once(write) -> None:
    file = write(
        "seed: -1\n"
        "model:\n"
        "  nme: x\n"
        "train:\n"
        "  epochs: 0\n"
        "  amp: float\n"
        "  label_smoothing: 1\n"
        "  optimizer: {lr: fast, momentum: .nan}\n"
        "  attack:\n"
        "    name: a-qapa\n"
        "    steps: many\n"
        "    stepz: 3\n"
        "  regularizers: [distill]\n"
        "quant: {precisions: [4, 1], calibration: {method: guess}}\n"
        "wings: 2\n"
    )
    found = problems(file)
    assert found.pop("quant.precisions.1")[0] == 14
    assert found.pop("train.regularizers.0.name") == (13, "unknown regularizer 'distill': did you mean 'distillation'?")
    assert found == {
        "seed": (1, "must be at least 0, got -1"),
        "model.nme": (3, "unknown key 'nme': did you mean 'name'?"),
        "train.epochs": (5, "must be at least 1, got 0"),
        "train.amp": (6, "must be one of no, bf16, fp16, got 'float'"),
        "train.label_smoothing": (7, "must be at least 0 and less than 1, got 1"),
        "train.optimizer.lr": (8, "must be a number, got 'fast'"),
        "train.optimizer.momentum": (8, "must be a finite number, got nan"),
        "train.attack.steps": (11, "must be a whole number, got 'many'"),
        "train.attack.stepz": (12, "unknown key 'stepz': did you mean 'steps'?"),
        "quant.calibration.method.name": (
            14,
            "unknown range method 'guess': choose from minmax, mse, percentile",
        ),
        "wings": (15, "unknown key 'wings': choose from data, model, quant, seed, train"),
    }


def test_the_message_starts_with_file_and_line(write) -> None:
    file = write("train:\n  epochs: 0\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["seed=-1"])
    assert str(caught.value).splitlines() == [
        "command line: seed: must be at least 0, got -1",
        f"{file}:2: train.epochs: must be at least 1, got 0",
    ]


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("train: 3", "train", "must be a mapping of keys to values, got 3"),
        ("train: {epochs: null}", "train.epochs", "must be a whole number, got null"),
        ("train: {epochs: 1.5}", "train.epochs", "must be a whole number, got 1.5"),
        ("model: {pretrained: 7}", "model.pretrained", "must be true or false, got 7"),
        ("model: {name: 7}", "model.name", "must be text, got 7"),
        ("model: {name: ''}", "model.name", "must not be empty, got ''"),
        ("quant: {precisions: 4}", "quant.precisions", "must be a list, got 4"),
        ("quant: {precisions: []}", "quant.precisions", "must have at least 1 item, got []"),
        ("quant: {precisions: [3.5]}", "quant.precisions.0", "3.5 is not a precision"),
        ("data: {val_share: 1}", "data.val_share", "must be at least 0 and less than 1, got 1"),
        (
            "quant: {calibration: {method: {name: percentile, percentile: 0}}}",
            "quant.calibration.method.percentile",
            "must be greater than 0 and at most 100",
        ),
        ("quant: {calibration: {samples: 8}}", "quant.calibration.samples", "must be at least 16, got 8"),
        (
            "data: {transform: {rand_augment: rand-m9, color_jitter: 0.3}}",
            "data.transform.color_jitter",
            "0.3 beside rand_augment=rand-m9, where timm leaves color jitter out: set color_jitter to 0",
        ),
        ("quant: {activations: live}", "quant.activations", "must be one of static, dynamic, got 'live'"),
        ("train: {clip_grad_norm: 0}", "train.clip_grad_norm", "must be greater than 0, got 0"),
        (
            "train: {attack: [a-qapa]}",
            "train.attack",
            "must name an attack or be a mapping with the key 'name', got ['a-qapa']",
        ),
        (
            "train: {precision: {choices: [4]}}",
            "train.precision.schedule",
            "must name a schedule: choose from curriculum, cycle, fixed, sandwich, uniform, weighted",
        ),
        ("train: {attack: a-qap}", "train.attack.name", "unknown attack 'a-qap': did you mean 'a-qapa'?"),
        ("data: {dataset: {name: 3}}", "data.dataset.name", "must name a dataset: choose from"),
    ],
)
def test_wrong_values(write, text: str, path: str, message: str) -> None:
    found = problems(write(text))
    assert list(found) == [path]
    assert found[path][0] == 1
    assert found[path][1].startswith(message)


def test_long_values_are_cut(write) -> None:
    found = problems(write(f"seed: {'x' * 500}"))
    assert len(found["seed"][1]) < 120


@pytest.mark.parametrize("value", ["4", "'4'", "w4a4"])
def test_precisions_are_written_in_every_way(write, value: str) -> None:
    recipe = load_recipe(
        write(f"quant: {{precisions: [32, {value}]}}\ntrain: {{precision: {{schedule: uniform, choices: [4]}}}}")
    )
    assert recipe.quant.precisions == (Precision(32, 32), Precision(4, 4))


@pytest.mark.parametrize("text", ["attack: a-qapa", "attack: {name: a-qapa}"])
def test_a_plugin_is_given_by_name_or_mapping(write, text: str) -> None:
    attack = load_recipe(write(f"train: {{{text}}}")).train.attack
    assert attack == AQapa()
    assert slot_name(attack) == "a-qapa"


@pytest.mark.parametrize("key", ["schedule", "name"])
def test_the_schedule_is_named_by_either_key(write, key: str) -> None:
    recipe = load_recipe(write(f"train: {{precision: {{{key}: uniform, choices: [8, 4]}}}}"))
    assert recipe.train.precision == Uniform(choices=(Precision(8, 8), Precision(4, 4)))


def test_plugins_can_be_given_ready_made() -> None:
    recipe = Recipe.model_validate({"train": {"attack": AQapa(steps=2)}})
    assert recipe.train.attack.steps == 2


def test_a_plugin_of_another_kind_does_not_fit() -> None:
    with pytest.raises(ValueError, match="must name a dataset"):
        Recipe.model_validate({"data": {"dataset": AQapa()}})


class TestSectionsFitTogether:
    def test_training_uses_allowed_precisions_only(self, write) -> None:
        found = problems(
            write("quant:\n  precisions: [32, 4]\ntrain:\n  precision: {schedule: uniform, choices: [4, 3]}\n")
        )
        assert found == {"train.precision.choices": (4, "3 must also be in quant.precisions, which has 32, 4")}

    @pytest.mark.parametrize(
        ("only", "place", "facts"),
        [
            ("[5]", ("train.gradient", 3), "5.*train.precision.*32, 4"),
            ("[32]", ("train.gradient.only", 5), "32.*float_too: true"),
        ],
    )
    def test_gradients_are_perturbed_at_precisions_that_are_trained(
        self, write, only: str, place: tuple[str, int], facts: str
    ) -> None:
        text = "quant: {{precisions: [32, 4]}}\ntrain:\n  gradient:\n    name: gir\n    only: {}\n"
        ((path, (line, message)),) = problems(write(text.format(only))).items()
        assert (path, line) == place
        assert re.search(facts, message)
        load_recipe(write(text.format("[4]")))
        load_recipe(write(text.format("[32, 4]") + "    float_too: true\n"))

    @pytest.mark.parametrize("attack", ["random-patch", "{name: lavan, steps: 2}"])
    def test_an_attack_that_is_no_training_attack_is_refused(self, write, attack: str) -> None:
        found = problems(write(f"seed: 1\ntrain:\n  attack: {attack}"))
        assert list(found) == ["train.attack"]
        line, message = found["train.attack"]
        assert line == 3
        assert re.search(r"random-patch|lavan", message)
        assert "cannot be used in training" in message

    def test_warm_up_is_no_longer_than_training(self, write) -> None:
        found = problems(write("train: {epochs: 2, scheduler: {warmup_epochs: 3}}"))
        assert found["train.scheduler.warmup_epochs"][1] == "must be at most train.epochs, which is 2, got 3"


@pytest.mark.parametrize(
    ("precision", "kind"), [("", Uniform), ("precision: cycle", Cycle), ("precision: {name: sandwich}", Sandwich)]
)
def test_a_schedule_without_choices_has_all_precisions_of_the_model(write, precision, kind):
    recipe = load_recipe(write(f"quant: {{precisions: [w4a8, 3]}}\ntrain: {{epochs: 2, {precision}}}"))
    assert recipe.train.precision == kind(choices=(Precision(4, 8), Precision(3, 3)))


def test_a_schedule_without_choices_follows_an_override(write):
    recipe = load_recipe(write("seed: 1"), ["quant.precisions=[8,4]"])
    assert recipe.train.precision == Uniform(choices=(Precision(8, 8), Precision(4, 4)))


def test_wrong_precisions_are_reported_once(write):
    assert list(problems(write("quant: {precisions: [8, 99]}"))) == ["quant.precisions.1"]


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("", "is empty; start from a copy"),
            ("# only a comment\n", "is empty"),
            ("- a\n- b\n", "is not a mapping of keys to values"),
            ("just text", "is not a mapping"),
            (b"\x80\x04\x95\x00", "is not a text file"),
        ],
    )
    def test_files_that_hold_no_recipe(self, write, content: str | bytes, words: str) -> None:
        with pytest.raises(UsageError, match=words):
            load_recipe(write(content))

    @pytest.mark.parametrize(
        ("content", "line", "words"),
        [
            ("seed: 1\ntrain: {epochs: 1\nmodel: x: y\n", 3, "while parsing a flow mapping: expected"),
            ("seed: 1\n\tx: 2\n", 2, "cannot start any token"),
            ("seed: 1\nmodel: {}\nseed: 2\n", 3, "key 'seed' is given twice"),
            ("seed: *nothing\n", 1, "undefined alias"),
            ("seed: 1\n---\nseed: 2\n", 2, "but found another document"),
            ("seed: \x07\n", 1, "special characters"),
        ],
    )
    def test_text_that_is_not_yaml(self, write, content: str, line: int, words: str) -> None:
        with pytest.raises(RecipeError, match=words) as caught:
            load_recipe(write(content))
        assert caught.value.problems[0].line == line

    def test_a_recipe_that_holds_itself(self, write) -> None:
        with pytest.raises(RecipeError, match=r"model\.args: must be a mapping"):
            load_recipe(write("model: &m\n  args: *m\n"))

    @pytest.mark.slow
    def test_a_recipe_without_bottom(self, write) -> None:
        with pytest.raises(RecipeError, match="nested too deeply"):
            load_recipe(write("model: " + "[" * 1000))

    def test_merged_keys_have_the_line_of_their_parent(self, write) -> None:
        file = write("model: {args: {a: &a {epochs: 0}}}\ntrain:\n  <<: *a\n")
        assert problems(file) == {"train.epochs": (2, "must be at least 1, got 0")}

    @pytest.mark.parametrize(("text", "value"), [("1e-3", 0.001), ("1_0", None), ("0123", None), (".5", 0.5)])
    def test_numbers_are_those_of_yaml_1_2(self, write, text: str, value: float | None) -> None:
        file = write(f"train: {{optimizer: {{lr: {text}}}}}")
        if value is not None:
            assert load_recipe(file).train.optimizer.lr == value

    def test_a_folder_or_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="is a folder, not a recipe"):
            load_recipe(tmp_path)
        with pytest.raises(UsageError, match="unknown recipe"):
            load_recipe(tmp_path / "missing.yaml")

    def test_a_file_that_may_not_be_read(self, write, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: Any, **settings: Any) -> str:
            raise PermissionError(13, "Permission denied")

        file = write("seed: 1")
        monkeypatch.setattr(Path, "read_text", refuse)
        with pytest.raises(UsageError, match=r"cannot read the recipe .*: Permission denied"):
            load_recipe(file)


class TestDump:
    TEXT = (
        "seed: 7\n"
        "model: {name: resnet18, checkpoint: a b.pth, args: {drop_rate: 0.1, widths: [1, 2]}}\n"
        "data: {dataset: {name: digits}, augment: none}\n"
        "quant: {precisions: [32, w4a8, 4, 2]}\n"
        "train:\n"
        "  optimizer: {lr: 1e-7}\n"
        "  precision: {schedule: uniform, choices: [w4a8, 2]}\n"
        "  attack: {name: a-qapa, steps: 3}\n"
        "  gradient: gir\n"
        "  regularizers: [distillation]\n"
    )

    @pytest.mark.parametrize("describe", [False, True])
    def test_a_dumped_recipe_reads_back_equal(self, write, describe: bool) -> None:
        recipe = load_recipe(write(self.TEXT))
        assert load_recipe(write(recipe.dump_yaml(describe=describe))) == recipe

    def test_it_is_written_out_in_full(self, write) -> None:
        text = load_recipe(write(self.TEXT)).dump_yaml()
        assert "  checkpoint: a b.pth\n" in text
        assert "  precisions: [32, w4a8, 4, 2]\n" in text
        assert "    schedule: uniform\n    choices: [w4a8, 2]\n" in text
        assert "  amp: 'no'\n" in text
        assert "  num_classes: null\n" in text

    def test_descriptions_are_comments(self, write) -> None:
        text = load_recipe(write("seed: 1\ntrain: {attack: a-qapa}")).dump_yaml(describe=True)
        lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
        assert lines["epochs"].endswith("# epochs of quantized training")
        assert "#" in lines["patch_bits"]


def test_every_key_is_described() -> None:
    from qadtr_brevitas.config.problems import fields_of, section_in

    def check(owner: Any) -> None:
        for name, field in fields_of(owner).items():
            assert field.description, f"{owner.__name__}.{name}"
            check(section_in(field.annotation))

    check(Recipe)


def test_a_recipe_does_not_change() -> None:
    recipe = Recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
