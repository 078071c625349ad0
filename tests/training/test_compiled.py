"""Compiled training passes: the eager ones are the reference."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert
from qadtr_brevitas.training import compiled
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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_graphs_are_whole_and_their_gradients_those_of_the_eager_model(
    model: SwitchableModel, layout: torch.memory_format
) -> None:
    model.to(memory_format=layout)
    run = compile_training(model, precisions=3, backend="aot_eager")
    assert run is not None
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    for precision in (32, 4, 2, 4):
        with at_precision(model, precision):
            ours, eager = gradients(run, model, images), gradients(model, model, images)
        assert ours.keys() == eager.keys()
        for name, gradient in eager.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 3


TINY_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
TINY_SWIN: dict[str, Any] = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args", "size", "target"),
    [
        ("cifar_resnet8", {}, 32, "ort"),
        ("vit_tiny_patch16_224", TINY_VIT, 32, "ort"),
        ("test_resnet", {}, 32, None),
        ("densenet121", {"growth_rate": 4, "block_config": (2, 1)}, 32, None),
        ("swin_tiny_patch4_window7_224", {**TINY_SWIN, "num_heads": (2, 2)}, 16, None),
        # The smallest images that it takes, and one block of each kind where the next takes as many channels.
        ("inception_v3", {"without": ("Mixed_5d", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7c")}, 75, None),
    ],
)
def test_networks_have_whole_training_graphs(name: str, args: dict[str, Any], size: int, target: str | None) -> None:
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    without: tuple[str, ...] = args.get("without", ())
    net = create_float_model(name, num_classes=3, args={key: args[key] for key in args if key != "without"})
    for block in without:
        setattr(net, block, nn.Identity())
    model = convert(net, [32, 4], image_size=(size, size), target=target).train()
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    calibrate(model, images)
    run = compile_training(model, precisions=2, backend="eager")
    assert run is not None
    found: list[dict[str, Tensor]] = []
    for forward in (run, model):
        # Stochastic depth and dropout draw the same numbers.
        torch.manual_seed(0)
        with at_precision(model, 4):
            found.append(gradients(forward, model, images))
    ours, eager = found
    assert ours.keys() == eager.keys()
    largest = max(float(gradient.abs().max()) for gradient in eager.values())
    for parameter, gradient in eager.items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-3, atol=1e-5 * largest)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_without_a_compiler_training_is_eager_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    # A GPU that training does not use compiles nothing for the CPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    recorder = Recorder()
    train(make_recipe(**SHORT, compile=True), tmp_path / "eager", device="cpu", observer=recorder)
    assert [message for message in recorder.messages if "compiler" in message] == recorder.messages
    assert len(recorder.messages) == 1
    train(make_recipe(**SHORT), tmp_path / "plain", device="cpu")
    assert same_weights(tmp_path / "eager", tmp_path / "plain")


def failing_forward(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no room for it")


def failing_backward(graph: Any, inputs: Any) -> Any:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition as partition

    return aot_autograd(fw_compiler=lambda traced, inputs: traced, bw_compiler=failing_forward, partition_fn=partition)(
        graph, inputs
    )


@pytest.mark.parametrize("failing", [failing_forward, failing_backward])
def test_a_compiler_that_fails_costs_nothing_and_is_told_of_once(
    failing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    # Passes of attacks are another matter.
    monkeypatch.setattr(compiled, "compile_passes", lambda *_, **__: None)
    monkeypatch.setattr(compiled, "compile_training", partial(compile_training, backend=failing))
    recorder = Recorder()
    train(make_recipe(epochs=2, compile=True), tmp_path / "failing", device="cpu", observer=recorder)
    monkeypatch.undo()
    assert len(recorder.messages) == 1
    assert "no room for it" in recorder.messages[0]
    # Patches, dropout and statistics of norms are those of a run that never compiled, bit for bit.
    train(make_recipe(epochs=2), tmp_path / "eager", device="cpu")
    assert same_weights(tmp_path / "failing", tmp_path / "eager")


def test_a_compiler_that_fails_later_leaves_passes_that_are_still_to_go_back(model: SwitchableModel) -> None:
    graphs = 0

    def second_fails(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return failing_forward(graph, inputs) if graphs > 1 else graph

    said: list[str] = []
    run = compile_training(model, precisions=2, report=said.append, backend=second_fails)
    assert run is not None
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def both(images: Tensor) -> Tensor:
        with at_precision(model, 32):
            first = run(images)
        with at_precision(model, 4):
            return first + run(images)

    def eager(images: Tensor) -> Tensor:
        with at_precision(model, 32):
            first = model(images)
        with at_precision(model, 4):
            return first + model(images)

    state = {name: value.clone() for name, value in model.state_dict().items()}
    ours, statistics = gradients(both, model, images), {name: b.clone() for name, b in model.named_buffers()}
    model.load_state_dict(state)
    expected = gradients(eager, model, images)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics, dict(model.named_buffers()))
    assert ["compiled" in said[0], "fails" in said[1], len(said)] == [True, True, 2]


def test_images_that_do_not_fit_are_no_fault_of_the_compiler(model: SwitchableModel) -> None:
    said: list[str] = []
    run = compile_training(model, precisions=1, report=said.append, backend="aot_eager")
    assert run is not None
    with pytest.raises(RuntimeError, match="shape"):
        run(torch.rand(4, 3, 12, 12))
    run(torch.rand(4, 3, 8, 8))
    assert [message for message in said if "fails" in message] == []
    assert len(said) == 1
