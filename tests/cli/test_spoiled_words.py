"""Words that terminals, shells and YAML would spoil."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path

import pytest

from qadtr_brevitas.cli.common import command_of
from qadtr_brevitas.cli.main import main
from qadtr_brevitas.config.plugins import make_plugin
from qadtr_brevitas.core.registry import DATASETS


@pytest.mark.parametrize("path", ["/data/my photos #1", "./a: b", "runs/a #2", "/data/it's", "~/x # y"])
def test_paths_are_taken_as_they_are_typed(path: str) -> None:
    assert make_plugin(DATASETS, "image-folder", [f"root={path}"]).root == path


@pytest.mark.parametrize(("text", "value"), [("8", 8), ("null", None), ("~", None), ("'8'", "8")])
def test_other_values_are_yaml(text: str, value: object) -> None:
    key, settings = ("root", {}) if text == "'8'" else ("image_size", {})
    assert getattr(make_plugin(DATASETS, "image-folder", [f"{key}={text}", *settings]), key) == value


def test_commands_to_type_next_can_be_typed() -> None:
    words = ["attack", Path("runs/it's #1"), "--target", "all"]
    assert shlex.split(command_of(*words)) == ["qadtr-brevitas", *map(str, words)]
    assert command_of("train", "digits", "train.epochs=3") == "qadtr-brevitas train digits train.epochs=3"


@pytest.mark.parametrize("as_json", [False, True])
def test_names_a_terminal_cannot_show_do_not_cost_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    recipe = tmp_path / "caf\u00e9.yaml"
    recipe.write_text("base: digits_qadtr\n", encoding="utf-8")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["recipes", "validate", str(recipe), *(["--json"] if as_json else [])]) == 0
    shown.flush()
    text = shown.buffer.getvalue().decode("ascii")
    if as_json:
        assert "caf\u00e9" in json.dumps(json.loads(text), ensure_ascii=False)
