import pytest

from qadtr_brevitas.core.errors import (
    CheckpointError,
    DataError,
    Problem,
    QadtrError,
    RecipeError,
    TrainingError,
    UsageError,
    suggest,
)


@pytest.mark.parametrize(
    ("kind", "code"),
    [(QadtrError, 1), (DataError, 1), (CheckpointError, 1), (TrainingError, 1), (UsageError, 2), (RecipeError, 2)],
)
def test_exit_codes(kind: type[QadtrError], code: int) -> None:
    assert issubclass(kind, QadtrError)
    assert kind.exit_code == code


def test_a_recipe_error_lists_every_problem_with_its_place() -> None:
    error = RecipeError("a.yaml", [Problem("train.epochs", "must be at least 1", 7), Problem("seed", "must be text")])
    assert str(error) == "a.yaml:7: train.epochs: must be at least 1\ncommand line: seed: must be text"
    assert [problem.path for problem in error.problems] == ["train.epochs", "seed"]


def test_a_problem_of_several_keys_has_no_path() -> None:
    assert str(RecipeError("attack gap", [Problem("", "scale is the wrong way round")])) == (
        "command line: scale is the wrong way round"
    )


@pytest.mark.parametrize(
    ("name", "choices", "words"),
    [
        ("epoch", ["epochs", "seed"], "did you mean 'epochs'?"),
        ("zzz", ["b", "a"], "choose from a, b"),
        ("x", [], "there is none to choose from"),
    ],
)
def test_suggestions(name: str, choices: list[str], words: str) -> None:
    assert suggest(name, choices) == words
