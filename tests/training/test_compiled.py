"""Compiled training passes: the eager ones are the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert
from qadtr_brevitas.training.compiled import compile_training
from qadtr_brevitas.training.loop import train
from tests.training.support import Recorder, calibrated_model, make_recipe, same_weights

SHORT: dict[str, Any] = {
    "epochs": 1,
    "float_epochs": 0,
    "scheduler": {"warmup_epochs": 0},
    "attack": None,
    "gradient": None,
    "regularizers": [],
    "norm_batches": 0,
}


@pytest.fixture
def model() -> SwitchableModel:
    torch.compiler.reset()
    counters.clear()
    model = calibrated_model().train()
    # Compiled graphs draw other random numbers.
    model.net.drop = nn.Identity()
    return model


def gradients(run: Any, model: SwitchableModel, images: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    run(images).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_graphs_are_whole_and_their_gradients_those_of_the_eager_model(model: SwitchableModel) -> None:
    run = compile_training(model, precisions=3, backend="aot_eager")
    assert run is not None
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for precision in (32, 4, 2, 4):
        with at_precision(model, precision):
            ours, eager = gradients(run, model, images), gradients(model, model, images)
        assert ours.keys() == eager.keys()
        for name, gradient in eager.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar_resnet8", "vit_tiny_patch16_224"])
def test_products_and_sums_of_a_network_for_a_target_are_traced(name: str) -> None:
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    net = create_float_model(name, num_classes=3, args=args if name.startswith("vit") else {})
    model = convert(net, [32, 4], image_size=(32, 32), target="ort").train()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calibrate(model, images)
    run = compile_training(model, precisions=2, backend="eager")
    assert run is not None
    with at_precision(model, 4):
        ours, eager = gradients(run, model, images), gradients(model, model, images)
    assert ours.keys() == eager.keys()
    largest = max(float(gradient.abs().max()) for gradient in eager.values())
    for parameter, gradient in eager.items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-3, atol=1e-5 * largest)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_without_a_compiler_training_is_eager_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recorder = Recorder()
    train(make_recipe(**SHORT, compile=True), tmp_path / "eager", device="cpu", observer=recorder)
    assert [message for message in recorder.messages if "compiler" in message] == recorder.messages
    assert len(recorder.messages) == 1
    train(make_recipe(**SHORT), tmp_path / "plain", device="cpu")
    assert same_weights(tmp_path / "eager", tmp_path / "plain")


@pytest.mark.slow
def test_a_compiled_run_learns_what_an_eager_one_does(tmp_path: Path) -> None:
    torch.compiler.reset()
    keys = {**SHORT, "precision": {"schedule": "fixed", "choice": 4}}
    losses = []
    for compile_it in (True, False):
        recorder = Recorder()
        train(make_recipe(**keys, compile=compile_it), tmp_path / str(compile_it), device="cpu", observer=recorder)
        losses.append([record.loss for record in recorder.steps])
    # Dropout draws other numbers, so that losses are alike but not equal.
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.25)
