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
