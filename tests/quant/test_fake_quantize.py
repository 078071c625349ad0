"""Quantize-dequantize against its definition, its gradients against autograd on the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qadtr_brevitas.quant import fake_quantize
from qadtr_brevitas.quant.fake_quantize import quantize_activation, quantize_images
from qadtr_brevitas.quant.quantize_weight import quantize_weight


def reference(x: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    """Compute straight-through rounding and clamping, differentiated by autograd: LSQ by definition."""
    levels = x / scale
    clipped = levels.clamp(lo, hi)
    return (clipped + (clipped.round() - clipped).detach()) * scale


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("lo", "hi"), [(0, 15), (0, 3), (-8, 7), (-1, 1), (0, 255)])
def test_activation_equals_its_definition(lo: int, hi: int) -> None:
    x, scale = inputs(3, 4, 5), torch.tensor(0.3)
    torch.testing.assert_close(quantize_activation(x, scale, lo, hi), reference(x, scale, lo, hi), rtol=0, atol=0)


@pytest.mark.parametrize(("lo", "hi"), [(0, 15), (-8, 7), (0, 255)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_activation_gradients_are_those_of_learned_steps(lo: int, hi: int, layout: torch.memory_format) -> None:
    def gradients(function: object, dtype: torch.dtype) -> list[Tensor]:
        x = inputs(2, 3, 4, 4).to(dtype).contiguous(memory_format=layout).requires_grad_()
        scale = torch.tensor(0.05, dtype=dtype, requires_grad=True)
        (function(x, scale, lo, hi) * inputs(2, 3, 4, 4, seed=1)).sum().backward()
        return [x.grad.float(), scale.grad.float()]

    ours, exact = gradients(quantize_activation, torch.float32), gradients(reference, torch.float64)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-6, atol=1e-6)
    # A sum of 96 differences of levels, each off by a few roundings of the larger one, |x / s| up to 60.
    atol = 96 * 4 * torch.finfo(torch.float32).eps * float(inputs(2, 3, 4, 4).abs().max() / 0.05)
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-4, atol=atol)


def test_blocks_and_whole_tensors_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for block in (7, 1 << 20):
        monkeypatch.setattr(fake_quantize, "_PART", block)
        x, scale = inputs(5, 5).requires_grad_(), torch.tensor(0.2, requires_grad=True)
        y = quantize_activation(x, scale, 0, 3)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, scale.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_the_path_of_other_devices_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for blockable in (True, False):
        monkeypatch.setattr(fake_quantize, "_is_blockable", lambda x, value=blockable: value)
        x, scale = inputs(40, 5).requires_grad_(), torch.tensor(0.2, requires_grad=True)
        y = quantize_activation(x, scale, -4, 3)
        (y * inputs(40, 5, seed=3)).sum().backward()
        results.append((y.detach(), x.grad, scale.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("lo", "hi"), [(0, 15), (-8, 7)])
def test_bfloat16_differs_by_its_rounding_alone(lo: int, hi: int) -> None:
    def run(function: object, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        x = (0.1 * inputs(200, 200)).bfloat16().to(dtype).requires_grad_()
        scale = torch.tensor(0.0517, requires_grad=True)
        y = function(x, scale, lo, hi)
        (y * x.detach()).sum().backward()
        return y.detach().float(), x.grad.float(), scale.grad.item()

    (y, dx, dscale), (exact_y, exact_dx, exact_dscale) = (
        run(quantize_activation, torch.bfloat16),
        run(reference, torch.float32),
    )
    assert len(y.unique()) <= hi - lo + 1
    # A level more or less where rounding carries a value over.
    assert ((y - exact_y).abs() > 2**-8 * exact_y.abs()).float().mean() < 0.01
    assert (y - exact_y).abs().max() < 1.1 * 0.0517
    torch.testing.assert_close(dx, exact_dx)
    # The difference of two sums a hundred times as large.
    assert dscale == pytest.approx(exact_dscale, abs=12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("keep_input", [False, True])
def test_clipped_values_pass_gradients_only_to_the_step(dtype: torch.dtype, strided: bool, keep_input: bool) -> None:
    for seed in range(50):
        step = 0.01 + 0.02 * torch.rand((), generator=torch.Generator().manual_seed(seed))
        scale = step.requires_grad_()
        clipped = (torch.tensor([[200.0, 300.0], [-200.0, -300.0]]) * step.detach()).to(dtype)
        x = (clipped.T if strided else clipped).requires_grad_()
        y = quantize_activation(x, scale, -128, 127, keep_input=keep_input)
        (y * x.detach().sign()).sum().backward()
        assert not x.grad.any()
        assert scale.grad.item() == pytest.approx(2 * 127 + 2 * 128, rel=0.01)


def test_a_tiny_step_in_float16_stays_above_zero() -> None:
    x = torch.tensor([0.0, 1e-7, 0.5], dtype=torch.float16, requires_grad=True)
    y = quantize_activation(x, torch.tensor(1e-9), 0, 255)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert y[0] == 0


def test_gradient_of_any_layout_is_accepted() -> None:
    x = inputs(4, 6).requires_grad_()
    quantize_activation(x, torch.tensor(0.2), -8, 7).mean().backward()
    inside = (x > -1.6) & (x < 1.4)
    torch.testing.assert_close(x.grad, inside / 24)


def test_a_fixed_step_gets_no_gradient() -> None:
    x, scale = inputs(10).requires_grad_(), torch.tensor(0.2)
    quantize_activation(x, scale, 0, 3).sum().backward()
    assert scale.grad is None
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}


def test_without_the_input_the_step_learns_from_clipped_values_only() -> None:
    x = torch.tensor([-1.0, 0.3, 1.1, 2.0, 9.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    y = quantize_activation(x, scale, 0, 3, keep_input=False)
    assert y.tolist() == [0.0, 0.5, 1.0, 1.5, 1.5]
    y.backward(torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0]))
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 0.0, 0.0]
    assert scale.grad.item() == pytest.approx(3 * (5 + 7))


def test_ties_go_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 3.5])
    assert quantize_activation(x, torch.tensor(1.0), 0, 15).tolist() == [0.0, 2.0, 2.0, 4.0]


@given(st.integers(2, 8), st.booleans(), st.floats(1e-3, 10))
def test_at_most_two_to_the_bits_levels(bits: int, signed: bool, scale: float) -> None:
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    y = quantize_activation(inputs(2000) * 100, torch.tensor(scale), lo, hi)
    assert len(y.unique()) <= 2**bits


@pytest.mark.parametrize("scale_shape", [(4, 1, 1, 1), (1, 1, 1, 1)])
def test_weight_gradients_are_those_of_learned_steps(scale_shape: tuple[int, ...]) -> None:
    def gradients(function: object, dtype: torch.dtype) -> list[Tensor]:
        w = inputs(4, 3, 3, 3).to(dtype).requires_grad_()
        scale = (torch.rand(scale_shape, generator=torch.Generator().manual_seed(5)) + 0.2).to(dtype).requires_grad_()
        (function(w, scale, -3, 3) * inputs(4, 3, 3, 3, seed=1)).sum().backward()
        return [w.grad.float(), scale.grad.float()]

    ours, exact = gradients(quantize_weight, torch.float32), gradients(reference, torch.float64)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def joint_parts() -> list[Tensor]:
    """Queries, keys and values as attention splits them: views with gaps."""
    joint = inputs(2, 7, 3 * 4 * 5).reshape(2, 7, 3, 4, 5).permute(2, 0, 3, 1, 4)
    return list(joint.unbind(0))


def test_values_with_gaps_between_them_are_those_without() -> None:
    for part in joint_parts():
        assert not part.is_contiguous()
        found = []
        for x in (part, part.contiguous()):
            x, scale = x.detach().requires_grad_(), torch.tensor(0.3, requires_grad=True)
            y = quantize_activation(x, scale, -4, 3)
            found.append((y, *torch.autograd.grad(y.square().sum(), (x, scale))))
        torch.testing.assert_close(*found, rtol=0, atol=0)


def test_gradients_of_gradients_reach_values_with_gaps() -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        x = joint_parts()[1].to(dtype).requires_grad_()
        scale = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        (of_scale,) = torch.autograd.grad(quantize_activation(x, scale, -4, 3).square().sum(), scale, create_graph=True)
        found.append(torch.autograd.grad(of_scale, x)[0].double())
    assert (found[1] != 0).any()
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def away_from_borders(*shape: int, scale: float, seed: int = 0) -> Tensor:
    """Return values that a small change moves neither to another level nor into or out of the range."""
    levels = torch.randint(-12, 13, shape, generator=torch.Generator().manual_seed(seed)).double()
    return (levels + 0.3 * inputs(*shape, seed=seed).double().tanh()) * scale


@pytest.mark.parametrize("keep_input", [True, False])
@pytest.mark.parametrize(("lo", "hi"), [(0, 15), (-8, 7), (-1, 1), (0, 255)])
def test_gradients_of_activation_gradients_are_their_finite_differences(lo: int, hi: int, keep_input: bool) -> None:
    x = away_from_borders(3, 4, scale=0.25).requires_grad_()
    scale = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)

    def quantize(x: Tensor, scale: Tensor) -> Tensor:
        return quantize_activation(x, scale, lo, hi, keep_input=keep_input)

    assert torch.autograd.gradgradcheck(quantize, (x, scale), atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize(("lo", "hi"), [(-8, 7), (-1, 1)])
def test_gradients_of_weight_gradients_are_their_finite_differences(lo: int, hi: int, shape: tuple[int, ...]) -> None:
    w = away_from_borders(3, 4, 2, scale=0.25).requires_grad_()
    scale = torch.full(shape, 0.25, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w, s: quantize_weight(w, s, lo, hi), (w, scale), atol=1e-4)


def test_gradients_of_dynamic_gradients_are_their_finite_differences() -> None:
    x = away_from_borders(2, 4, scale=0.25).requires_grad_()
    scale = torch.full((2,), 0.25, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: quantize_images(x, scale, 0, 15, low=0.0), (x,), atol=1e-4)


@pytest.mark.parametrize("blockable", [True, False])
def test_recording_a_graph_changes_no_gradient(blockable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_quantize, "_is_blockable", lambda x: blockable)
    results = []
    for create_graph in (False, True):
        x, scale = inputs(40, 5).requires_grad_(), torch.tensor(0.2, requires_grad=True)
        y = quantize_activation(x, scale, -4, 3)
        results.append(torch.autograd.grad((y * inputs(40, 5, seed=3)).sum(), (x, scale), create_graph=create_graph))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
