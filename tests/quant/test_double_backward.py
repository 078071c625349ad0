"""Penalties on input gradients train whole switchable networks, at every precision."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import qadtr_brevitas.models  # noqa: F401  registers the CIFAR networks
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, uniform

PRECISIONS = (32, 8, 4, 2)
NETWORKS = {"cifar_resnet8": (16, 16), "test_vit": (160, 160)}


def straight_through(x: Tensor, quantized: Tensor, passes: Tensor) -> Tensor:
    """Return quantized values with the gradient of x where it passes, and none where values are clipped."""
    passed = x * passes
    return passed + (quantized - passed).detach()


def plain_activation(x: Tensor, scale: Tensor, lo: int, hi: int, *, keep_input: bool) -> Tensor:
    quantized = (x / scale).round().clamp(lo, hi) * scale
    judged = x if keep_input else quantized
    return straight_through(x, quantized, (judged > lo * scale) & (judged < hi * scale))


def plain_weight(w: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    levels = w / scale
    return straight_through(w, levels.round().clamp(lo, hi) * scale, (levels > lo) & (levels < hi))


@pytest.fixture(scope="module", params=NETWORKS)
def model(request: pytest.FixtureRequest) -> SwitchableModel:
    torch.manual_seed(0)
    switchable = convert(timm.create_model(request.param, num_classes=4), PRECISIONS)
    calibrate(switchable, [images(switchable)])
    return switchable


def images(model: SwitchableModel) -> Tensor:
    return torch.rand(2, 3, *model.image_size, generator=torch.Generator().manual_seed(0))


def penalty_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    parameters = {name: p for name, p in model.named_parameters() if "threshold" not in name}
    # PyTorch's fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1]))
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        found = torch.autograd.grad(gradient.square().sum(), list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("training", [False, True])
def test_penalty_gradients_equal_those_of_quantizers_written_with_plain_operations(
    model: SwitchableModel, training: bool, precision: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.train(training)
    with at_precision(model, precision):
        ours = penalty_gradients(model, images(model))
        monkeypatch.setattr(uniform, "quantize_activation", plain_activation)
        monkeypatch.setattr(uniform, "quantize_weight", plain_weight)
        plain = penalty_gradients(model, images(model))
    assert ours.keys() == plain.keys()
    assert len(ours) > 10
    largest = max(float(g.abs().max()) for g in plain.values())
    assert largest > 0
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, plain[name], rtol=1e-3, atol=1e-4 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
