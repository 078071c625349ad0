"""The tutorials of docs/ run from their first line to their last, on a budget of seconds."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from qadtr_brevitas.cli.main import main

TUTORIALS = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))
FENCE = re.compile(r"^```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a reader waits a minute for, in a second.
TRAINING = ["train.float_epochs=0", "train.epochs=1", "train.norm_batches=0", "train.batch_size=16"]
TRAINING += ["data.train_limit=48", "data.test_limit=20", "quant.calibration={method: minmax, samples: 16}"]
LESS = {
    "train": TRAINING,
    "attack": ["steps=2", "batch_size=16", "--train-images", "32", "--held-out", "16"],
    "evaluate": ["--images", "20"],
    "export": ["--images", "2"],
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: one tutorial finds the runs of another."""
    return tmp_path_factory.mktemp("reader")


def blocks(tutorial: Path) -> Iterator[tuple[str, str, str]]:
    """Yield language, title and text of each block of code."""
    yield from FENCE.findall(tutorial.read_text(encoding="utf-8"))


def run(command: str) -> int:
    words = shlex.split(command, comments=True)
    assert words[0] == "qadtr-brevitas"
    less = LESS.get(words[1], [])
    less = [*less, "--audit-images", "20"] if "--audit" in words else less
    less = [*less, "--certify-masks", "2"] if "--certify" in words else less
    slow_attack = "{name: patch-auto, size: 8}"
    words = ["fgsm" if word == slow_attack else word for word in words]
    return main([*words[1:], *less])


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_every_command_works(
    tutorial: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("qonnx")
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    count = 0
    for language, title, text in blocks(tutorial):
        if title:
            (folder / title).write_text(text, encoding="utf-8")
        elif language == "python":
            code = compile(text, tutorial.name, "exec")
            exec(code, names)
        elif language == "bash":
            for command in text.splitlines():
                code = run(command)
                assert code == 0, (command, capsys.readouterr().err)
                count += 1
    assert count


def test_there_are_tutorials() -> None:
    assert len(TUTORIALS) == 5
