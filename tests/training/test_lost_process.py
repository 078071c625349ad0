"""A training of two processes of which one is killed, and which torchrun starts again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.launch import torchrun

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


@pytest.mark.slow
def test_the_others_end_with_one_message_and_a_restart_resumes(tmp_path: Path, repository: Path) -> None:
    script, run = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(KILLED)
    done = torchrun(repository, 2, str(script), str(run), restarts=1)
    assert done.returncode == 0, done.stderr
    assert "lost" in done.stdout
    assert done.stderr.count("Error: another process of this training has ended") == 1
    assert "Traceback" not in done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 13))
    assert (run / "last").is_dir()
