"""What happens before heavy imports, and what is on the screen while a command runs."""

from __future__ import annotations

import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from rich.console import Console

import qadtr_brevitas
from qadtr_brevitas.cli import common, train_progress
from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.cli.start import check_models
from qadtr_brevitas.cli.train_progress import TrainingProgress
from qadtr_brevitas.pipeline.directories import CONFIG_FILE, WEIGHTS_FILE
from qadtr_brevitas.training.log import StepRecord

WRONG = [
    (["evaluate", "nowhere"], "nowhere"),
    (["attack", "nowhere"], "nowhere"),
    (["analyze", "size", "nowhere"], "nowhere"),
    (["analyze", "sizes", "nowhere"], "did you mean 'size'?"),
    (["export", "nowhere", "-p", "4", "-f", "qonnx"], "nowhere"),
    (["report", "nowhere"], "nowhere"),
    (["study", "table99"], "table99"),
    (["train", "digits_qadtt"], "digits_qadtr"),
    (["train", "digits_qat+qadtt"], "qadtr"),
    (["convert", "resnet18", "--calibrate", "image-folder:nowhere"], "no folder nowhere"),
    (["convert", "resnet18", "--calibrate", "image-foldr:nowhere"], "image-folder"),
]


def test_wrong_names_and_paths_are_found_before_pytorch_is_loaded() -> None:
    code = (
        "import sys\nfrom qadtr_brevitas.cli.main import main\n"
        f"for arguments, _ in {WRONG!r}:\n"
        "    print('==', file=sys.stderr)\n"
        "    assert main(arguments) in (1, 2)\n"
        "    assert not {'torch', 'timm', 'brevitas'} & set(sys.modules), arguments"
    )
    folder = Path(qadtr_brevitas.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    messages = done.stderr.split("==\n")[1:]
    for message, (arguments, fact) in zip(messages, WRONG, strict=True):
        assert fact in message, arguments


@pytest.mark.parametrize("place", [".", "last"])
@pytest.mark.parametrize(("epochs", "is_finished"), [(1, False), (2, True)])
def test_models_whose_training_is_not_finished_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, epochs: int, is_finished: bool
) -> None:
    (tmp_path / "last").mkdir()
    for file in (tmp_path / "last" / name for name in (WEIGHTS_FILE, CONFIG_FILE)):
        file.touch()
    (tmp_path / "recipe.yaml").write_text("train: {float_epochs: 0, epochs: 2}")
    records = "".join(f'{{"kind": "epoch", "epoch": {epoch}}}\n' for epoch in range(epochs))
    (tmp_path / "metrics.jsonl").write_text(records)
    check_models([tmp_path / place])
    said = " ".join(capsys.readouterr().err.split())
    assert ("is not finished (epoch 1 of 2)" in said) != is_finished


@pytest.mark.parametrize("width", [80, 120])
def test_count_and_time_left_survive_long_names(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    text = StringIO()
    terminal = Console(file=text, force_terminal=True, width=width)
    monkeypatch.setattr(common, "stderr", lambda: terminal)
    with common.progress("training " + "a/long/folder/" * 6) as report:
        report(7_123, 10_000, "attack resnet20-with-a-long-name " * 4)
        report(7_124, 10_000, "attack resnet20-with-a-long-name " * 4)
    last = text.getvalue().split("\r")[-1]
    assert "7124/10000" in last
    assert "-:--:--" in last or "0:0" in last
    assert "training a/long" in last


def test_the_time_that_a_training_takes_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    observer = TrainingProgress(lambda done, total, note="": None)
    observer.on_start(step=0, total_steps=1223, epochs=1)
    for step in range(1, 61):
        monkeypatch.setattr(train_progress.time, "monotonic", lambda step=step: 2.0 * step)
        observer.on_step(
            StepRecord(step=step, epoch=0, phase="quantized", precision="4", loss=1.0, lr=0.1, images_per_s=1)
        )
    said = capsys.readouterr().err
    assert "1200 steps are left, about 40 min" in said
    assert said.count("steps are left") == 1


@pytest.mark.parametrize(
    ("words", "incomplete", "offered"),
    [
        (["train"], "digits_qa", {"digits_qat", "digits_qadtr"}),
        (["train"], "digits_qat+qadtr_no_g", {"digits_qat+qadtr_no_gir"}),
        (["train", "digits_qat"], "train.optimizer.l", {"train.optimizer.lr="}),
        (["recipes", "show"], "fine", {"finetune"}),
        (["study"], "table1", {"table11"}),
        (["list"], "sch", {"schedules"}),
        (["analyze"], "s", {"size", "spatial"}),
        (["attack", "runs", "--attack"], "g", {"gap"}),
        (["evaluate", "runs", "--data"], "c", {"cifar10"}),
    ],
)
def test_shells_complete_names(words: list[str], incomplete: str, offered: set[str]) -> None:
    found = ShellComplete(cli, {}, "qadtr-brevitas", "_COMPLETE").get_completions(words, incomplete)
    assert offered <= {item.value for item in found}
    assert all(item.value.startswith(incomplete) for item in found)
