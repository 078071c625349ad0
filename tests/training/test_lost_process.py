"""A training of several processes of which one is killed, and which torchrun or its user starts again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.training.launch import start_torchrun, torchrun

KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from qadtr_brevitas.core.errors import TrainingError
from qadtr_brevitas.training.log import TrainingObserver
from qadtr_brevitas.training.loop import train
from tests.training.support import make_recipe
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

class Killer(TrainingObserver):
    def on_step(self, record):
        if first and record.step == 7:
            print("lost", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

recipe = make_recipe(epochs=2, float_epochs=0, attack=None, regularizers=[], norm_batches=0, checkpoint_every=2)
try:
    train(recipe, sys.argv[1], device="cpu", observer=Killer())
except TrainingError as error:
    sys.exit(f"Error: {error}")
"""

# Eight steps an epoch.
RECIPE = """
model: {name: cifar_resnet8}
data: {dataset: {name: shapes, image_size: 8, classes: 3, train_images: 96, test_images: 30}}
quant: {precisions: [32, 4], calibration: {samples: 32}}
train:
  epochs: 8
  batch_size: 12
  float_epochs: 0
  precision: {schedule: uniform, choices: [32, 4]}
  checkpoint_every: 4
"""


def steps_of(run: Path) -> list[int]:
    """The steps that a run has logged."""
    log = run / "metrics.jsonl"
    # The last line may be unfinished.
    lines = [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.is_file() else []
    return [line["step"] for line in lines if line["kind"] == "step"]


@pytest.mark.slow
def test_the_others_end_with_one_message_and_a_restart_resumes(tmp_path: Path, repository: Path) -> None:
    script, run = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(KILLED)
    done = torchrun(repository, 2, str(script), str(run), restarts=1)
    assert done.returncode == 0, done.stderr
    assert "lost" in done.stdout
    assert done.stderr.count("Error: another process of this training has ended") == 1
    assert "Traceback" not in done.stderr
    assert steps_of(run) == list(range(1, 13))
    assert (run / "last").is_dir()


def kill_rank(rank: int, launcher: subprocess.Popen[str], run: Path, *, after: int) -> None:
    """Kill a process of torchrun once the run has logged a step."""
    deadline = time.monotonic() + 200
    while after not in steps_of(run):
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes = {process.environ().get("RANK"): process for process in psutil.Process(launcher.pid).children()}
    os.kill(processes[str(rank)].pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not psutil.LINUX, reason="other systems do not show the environment of a process")
def test_of_three_processes_those_left_tell_once_and_the_same_command_goes_on(tmp_path: Path, repository: Path) -> None:
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    command = ["-m", "qadtr_brevitas", "train", str(recipe), "-o", str(run), "--device", "cpu"]
    # Whichever is killed, the first one included.
    for rank, step in ((0, 6), (2, 16)):
        launcher = start_torchrun(repository, 3, *command)
        kill_rank(rank, launcher, run, after=step)
        _, errors = launcher.communicate()
        assert launcher.returncode != 0
        assert "SIGKILL" in errors
        # Torchrun's SIGTERM may come before those left find out.
        told = [line for line in errors.splitlines() if line.startswith(("Error:", "Interrupted"))]
        assert len(told) == 1, errors
        assert "another process of this training has ended" in told[0] or "Repeat the command" in told[0]
        # Only torchrun itself ends with one.
        assert errors.count("Traceback") == 1, errors
    done = torchrun(repository, 3, *command)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert steps_of(run) == list(range(1, 65))
