import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.cli.train_progress import accuracy_table, epoch_line
from qadtr_brevitas.training.log import EpochRecord
from tests.training.support import make_recipe, same_weights


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    keys = {"attack": None, "regularizers": [], "gradient": None, "float_epochs": 0, "norm_batches": 1}
    path = tmp_path / "tiny.yaml"
    path.write_text(make_recipe(**keys, epochs=2).dump_yaml())
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["train", *map(str, arguments)], env={"NO_COLOR": "1", "OMP_NUM_THREADS": "1"})


def test_writes_a_run_and_names_the_next_command(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = run(recipe, "-o", output, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "epoch 1/2 (quantized): loss " in result.stderr
    assert "test accuracy (%) at 32: " in result.stderr
    assert f"wrote {output}/last and {output}/metrics.jsonl; next: qadtr-brevitas attack {output}" in result.stderr
    assert "accuracy (%) on test images, at" in result.stdout
    assert "finished model" in result.stdout
    again = run(recipe, "-o", output, "--device", "cpu")
    assert again.exit_code == 0
    assert "nothing to do" in again.stderr
    assert "wrote" not in again.stderr


def test_metrics_of_plug_ins_are_shown_in_lines_and_tables() -> None:
    means = {"loss": 1.5, "images_per_s": 300.0, "feature_distance": 0.25, "gir_cosine": 0.5}
    record = EpochRecord(
        step=6, epoch=0, phase="quantized", means=means, split="val", val_accuracy={"32": 0.5, "4": 0.25}
    )
    metrics = ["feature distance 0.250", "gir cosine 0.500"]
    assert all(text in epoch_line(record, 3) for text in ("loss 1.5", "300 images/s", *metrics))
    table = accuracy_table(record)
    assert table.caption == ", ".join(metrics)
    assert [column.header for column in table.columns][1:] == ["32", "4"]


def test_json_is_one_document(recipe: Path, tmp_path: Path) -> None:
    result = run(recipe, "-o", tmp_path / "run", "--device", "cpu", "--json", "-q")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["run"] == str(tmp_path / "run")
    assert document["models"] == [str(tmp_path / "run" / "last")]
    assert list(document["record"]["val_accuracy"]) == ["32", "4", "2"]
    assert result.stderr == ""


def test_overrides_and_seed_reach_the_recipe(recipe: Path, tmp_path: Path) -> None:
    result = run(recipe, "train.epochs=1", "train.scheduler.warmup_epochs=0", "--seed", "7", "-o", tmp_path / "run")
    assert result.exit_code == 0, result.output
    written = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "seed: 7" in written
    assert "epochs: 1" in written


def test_default_output_is_named_after_the_recipe(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(recipe, "train.epochs=1", "train.scheduler.warmup_epochs=0", "--device", "cpu", "-q")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "tiny" / "last").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.epoch=1"], "train.epoch: unknown key: did you mean 'train.epochs'?"),
        (["train.epochs=0"], "train.epochs"),
        (["--resume", "maybe"], "Invalid value for '--resume'"),
        (["--device", "tpu"], "'tpu' is not a device"),
        (["train.batch_size=97"], "is more than the 96 training images"),
    ],
)
def test_wrong_input_exits_with_2(recipe: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(recipe, *arguments, "-o", tmp_path / "run")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_never_needs_overwrite(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    short = ("train.epochs=1", "train.scheduler.warmup_epochs=0", "--device", "cpu", "-o", output)
    assert run(recipe, *short).exit_code == 0
    refused = run(recipe, *short, "--resume", "never")
    assert refused.exit_code == 2
    assert "already holds a run" in refused.stderr
    assert run(recipe, *short, "--resume", "never", "--overwrite").exit_code == 0


@pytest.mark.slow
def test_killed_command_goes_on(tmp_path: Path, repository: Path) -> None:
    shapes = "{name: shapes, image_size: 8, classes: 3, train_images: 96, test_images: 30}"
    keys = "train: {epochs: 2, batch_size: 16, scheduler: {warmup_epochs: 0}, checkpoint_every: 2, norm_batches: 1}"
    small = "model: {name: cifar_resnet8}\nquant: {precisions: [32, 4]}"
    recipe = tmp_path / "shapes.yaml"
    recipe.write_text(f"data: {{dataset: {shapes}}}\n{keys}\n{small}\n")
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    arguments = [str(recipe), "--device", "cpu", "--threads", "1", "-q", "-o"]
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "qadtr_brevitas", "train", *arguments, str(killed)]
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 120
    while not (killed / "state" / "training.pt").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for output in (killed, tmp_path / "whole"):
        assert run(*arguments, output).exit_code == 0
    assert same_weights(killed, tmp_path / "whole")
