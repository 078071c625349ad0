"""Training by two processes: compiled as eager, and a batch in parts as at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qadtr_brevitas.core.device import has_compiler
from tests.training.launch import torchrun
from tests.training.support import weights

RUNS = """
import sys, torch
torch.set_num_threads(1)
from qadtr_brevitas.training.loop import train
from tests.training.support import make_recipe
keys = dict(drop=0.0, epochs=1, float_epochs=0, regularizers=[], norm_batches=0, scheduler={"warmup_epochs": 0})
precision = {"schedule": "sandwich", "choices": [32, 4]}
for compile_it in (True, False):
    recipe = make_recipe(**keys, attack=None, gradient=None, precision=precision, compile=compile_it)
    train(recipe, f"{sys.argv[1]}/{compile_it}", device="cpu")
"""

PARTS = """
import sys, torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
torch.set_num_threads(1)
from qadtr_brevitas.training import loop
from tests.training.test_accumulate import recipe_of
sent, replicate = [], loop.replicate

def counted(state, bucket):
    sent.append(bucket.index())
    return allreduce_hook(state, bucket)

def with_count(forward, accelerator):
    replica = replicate(forward, accelerator)
    replica.register_comm_hook(None, counted)
    return replica

loop.replicate = with_count
precision = {"schedule": "sandwich", "choices": [32, 4, 2]}
for count in (1, 4):
    sent.clear()
    recipe = recipe_of(count, precision=precision, float_epochs=0, regularizers=["distillation"])
    run = loop.train(recipe, f"{sys.argv[1]}/{count}", device="cpu")
    (run / "sent").write_text(str(len(sent)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler("cpu"), reason="there is no C++ compiler")
def test_compiled_training_is_that_of_the_eager_model(tmp_path: Path, repository: Path) -> None:
    script = tmp_path / "runs.py"
    script.write_text(RUNS)
    done = torchrun(repository, 2, str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr
    compiled, eager = (weights(tmp_path / name) for name in ("True", "False"))
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    # The two are not one and the same code.
    assert any(not torch.equal(compiled[name], eager[name]) for name in eager)


@pytest.mark.slow
def test_gradients_of_parts_are_sent_together_once_per_update(tmp_path: Path, repository: Path) -> None:
    script = tmp_path / "parts.py"
    script.write_text(PARTS)
    done = torchrun(repository, 2, str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr
    # Six updates, of three precisions each, of a network whose gradients are sent in one go.
    assert [(tmp_path / name / "sent").read_text() for name in ("1", "4")] == ["6", "6"]
    torch.testing.assert_close(weights(tmp_path / "1"), weights(tmp_path / "4"), rtol=1e-3, atol=1e-4)
