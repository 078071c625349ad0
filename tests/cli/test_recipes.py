from __future__ import annotations

import json
from pathlib import Path

import pytest

from qadtr_brevitas.cli.main import main
from qadtr_brevitas.config.shipped import find_recipe, recipe_description, shipped_recipes


def test_list_has_every_recipe_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    captured = capsys.readouterr()
    for name, path in shipped_recipes().items():
        assert name in captured.out
        assert recipe_description(path) in captured.out
    assert "next: qadtr-brevitas recipes show NAME" in captured.err


def test_list_takes_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list", "digits_*", "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert names
    assert all(name.startswith("digits_") for name in names)


def test_show_prints_what_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "digits_qat"]) == 0
    assert capsys.readouterr().out == find_recipe("digits_qat").read_text()


def test_show_prints_what_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "digits_qat", "--keys", "train.epochs=77"]) == 0
    text = capsys.readouterr().out
    assert "  epochs: 77 " in text
    assert "# epochs of quantized training" in text
    assert main(["recipes", "show", "digits_qat", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 0


def test_copy_then_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "mine.yaml"
    assert main(["recipes", "copy", "digits_qat", str(target)]) == 0
    assert capsys.readouterr().err == f"wrote {target}; next: qadtr-brevitas train {target} -o DIR\n"
    assert main(["recipes", "validate", str(target), "train.epochs=3"]) == 0
    assert capsys.readouterr().err.startswith(f"{target} is valid; next: qadtr-brevitas train {target} train.epochs=3")
    assert main(["recipes", "copy", "digits_qat", str(target)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["recipes", "copy", "digits_qat", str(target), "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": str(target)}


def test_validate_says_what_the_search_for_masks_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "validate", "digits_masked", "train.masks.grid=2"]) == 0
    # 0.3 * 4 + 0.7 * 8
    assert "6.8 forward passes" in capsys.readouterr().err
    assert main(["recipes", "validate", "digits_qat"]) == 0
    assert "forward passes" not in capsys.readouterr().err


def test_validate_lists_every_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("sed: 1\ntrain:\n  epochs: 0\n")
    assert main(["recipes", "validate", str(file), "epochs=3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Error:",
        "command line: epochs: unknown key: did you mean 'train.epochs'?",
        f"{file}:1: sed: unknown key 'sed': did you mean 'seed'?",
        f"{file}:3: train.epochs: must be at least 1, got 0",
    ]


@pytest.mark.parametrize("command", ["show", "copy", "validate"])
def test_an_unknown_recipe(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", command, "digits_qatt"]) == 2
    assert "'digits_qatt': did you mean 'digits_qat'?" in capsys.readouterr().err
