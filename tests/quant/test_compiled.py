"""Compiled passes of attacks: the eager ones are the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from qadtr_brevitas.core.device import has_compiler
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.quant import (
    SwitchableModel,
    at_precision,
    calibrate,
    convert,
    folded_norms,
    frozen_weights,
    set_precision,
)
from qadtr_brevitas.quant.compiled import compile_passes
from qadtr_brevitas.quant.layers import switchable_layers
from tests.training.support import TinyNet


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def make_model(**settings: Any) -> SwitchableModel:
    torch.manual_seed(0)
    model = convert(TinyNet(), [32, 8, 4, 2], image_size=(8, 8), **settings)
    calibrate(model, [rand(16, 3, 8, 8)])
    return model.eval()


@pytest.fixture
def model() -> SwitchableModel:
    torch.compiler.reset()
    counters.clear()
    return make_model()


def passes(model: SwitchableModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their squares in the images."""
    images = images.clone().requires_grad_()
    logits = model(images)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), images)[0]


def agree(model: SwitchableModel, images: Tensor) -> None:
    """Logits and gradients are the same to 1e-5 of the largest."""
    ours = passes(model, images)
    with model.switch.having(passes=None):
        eager = passes(model, images)
    for our, reference in zip(ours, eager, strict=True):
        assert float((our - reference).abs().max() / reference.abs().max()) <= 1e-5


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_one_graph_serves_all_precisions_below_32_and_any_number_of_images(model: SwitchableModel) -> None:
    said: list[str] = []
    compile_passes(model, report=said.append, backend="aot_eager")
    images = rand(6, 3, 8, 8)
    # White and black pixels have a gradient.
    images[:, :, 0, 0], images[:, :, 1, 1] = 1, 0
    with frozen_weights(model), folded_norms(model, images):
        for precision, count in ((32, 6), (8, 6), (4, 6), (2, 4), (4, 3), (32, 2)):
            set_precision(model, precision)
            agree(model, images[:count])
    assert not counters["graph_break"]
    assert graphs() == 2
    assert len(said) == 2
    assert "32 bit" in said[0]
    assert "8 bit" in said[1]


def test_changed_weights_thresholds_and_foldings_are_seen(model: SwitchableModel) -> None:
    compile_passes(model, backend="aot_eager")
    images = rand(4, 3, 8, 8)
    layer = next(iter(switchable_layers(model).values()))
    with at_precision(model, 4):
        for _ in range(2):
            with frozen_weights(model):
                agree(model, images)
                with torch.no_grad():
                    layer.weight.mul_(1.5)
                agree(model, images)
                with torch.no_grad():
                    layer.weight_quant.quantizer.thresholds["8"].mul_(0.5)
                agree(model, images)
            layer.weight.data = layer.weight.detach() * 2
        with frozen_weights(model):
            for _ in range(2):
                with folded_norms(model, images):
                    agree(model, images)
            # Attacks may go back through one graph twice.
            moving = images.clone().requires_grad_()
            total = model(moving).square().sum()
            first, second = (torch.autograd.grad(total, moving, retain_graph=True)[0] for _ in range(2))
            assert torch.equal(first, second)
    assert graphs() <= 2


def test_other_passes_are_those_of_the_model_itself(model: SwitchableModel) -> None:
    compile_passes(model, backend="aot_eager")
    images = rand(4, 3, 8, 8)
    passes(model, images)
    with frozen_weights(model):
        passes(model, images[:1])
        model(images)
        handle = model.net.get_submodule("conv1").register_forward_hook(lambda *_: None)
        passes(model, images)
        handle.remove()
        model.train()
        passes(model, images)
        model.eval()
        assert graphs() == 0
        passes(model, images)
        assert graphs() == 1


def test_other_quantizers_have_a_graph_for_each_precision_at_most() -> None:
    torch.compiler.reset()
    counters.clear()
    model = make_model(activations="dynamic")
    compile_passes(model, backend="aot_eager")
    with frozen_weights(model):
        for precision in (8, 4):
            with at_precision(model, precision):
                agree(model, rand(4, 3, 8, 8))
    assert not counters["graph_break"]
    assert 1 <= graphs() <= 2


TINY_VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
TINY_SWIN: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": (2,),
    "num_heads": (2,),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args", "size", "target", "backend"),
    [
        ("vit_tiny_patch16_224", TINY_VIT, 16, None, "aot_eager"),
        ("swin_tiny_patch4_window7_224", TINY_SWIN, 16, None, "eager"),
        ("cifar_resnet8", {}, 32, "finn", "eager"),
        ("mobilenetv3_small_050", {}, 32, None, "eager"),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, 32, None, "eager"),
    ],
)
def test_networks_have_whole_graphs(
    name: str, args: dict[str, Any], size: int, target: str | None, backend: str
) -> None:
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    net = create_float_model(name, num_classes=3, args=args)
    model = convert(net, [32, 8, 4], image_size=(size, size), target=target).eval()
    calibrate(model, [rand(4, 3, size, size)])
    said: list[str] = []
    compile_passes(model, report=said.append, backend=backend)
    with frozen_weights(model):
        for precision in (32, 4):
            with at_precision(model, precision):
                agree(model, rand(4, 3, size, size))
    assert not counters["graph_break"]
    assert graphs() == len(said) == 2
    assert all("compiled the passes" in message for message in said)


def test_layers_with_hooks_are_told_of(model: SwitchableModel) -> None:
    said: list[str] = []
    model.net.get_submodule("conv1").register_forward_hook(lambda *_: None)
    compile_passes(model, report=said.append, backend="aot_eager")
    assert model.switch.passes is None
    assert len(said) == 1
    assert "hooks" in said[0]


def test_a_compiler_that_fails_is_told_of_once(model: SwitchableModel) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("no room")

    said: list[str] = []
    compile_passes(model, report=said.append, backend=failing)  # pyright: ignore
    with frozen_weights(model):
        for precision in (32, 4):
            with at_precision(model, precision):
                agree(model, rand(4, 3, 8, 8))
    assert len(said) == 1
    assert "no room" in said[0]


def test_images_that_do_not_fit_are_no_fault_of_the_compiler(model: SwitchableModel) -> None:
    said: list[str] = []
    compile_passes(model, report=said.append, backend="aot_eager")
    with frozen_weights(model), pytest.raises(RuntimeError, match="shape"):
        passes(model, rand(4, 3, 12, 12))
    assert not any("fails" in message for message in said)


def test_without_a_compiler_it_says_so(model: SwitchableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said: list[str] = []
    compile_passes(model, report=said.append)
    assert model.switch.passes is None
    assert len(said) == 1
    assert "no-such-compiler" in said[0]


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler("cpu"), reason="there is no C++ compiler")
def test_values_of_the_default_compiler_are_those_of_the_eager_model(model: SwitchableModel) -> None:
    compile_passes(model)
    with frozen_weights(model):
        for precision in (8, 4, 2):
            with at_precision(model, precision):
                # Of many more values, rounding would move some to another level.
                agree(model, rand(4, 3, 8, 8))
    assert graphs() == 1
