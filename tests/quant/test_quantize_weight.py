"""Weights quantized in tiles and by fused kernels: the formulas in float64 are the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.core.device import has_compiler
from qadtr_brevitas.quant import fake_quantize, quantize_weight
from qadtr_brevitas.quant.fused import FusedRowKernels
from qadtr_brevitas.quant.quantize_weight import quantize_weight as quantize

SHAPES = [
    ((6, 5, 3, 3), (6, 1, 1, 1)),
    ((6, 5, 3, 3), (1, 1, 1, 1)),
    ((6, 5, 3, 3), ()),
    ((40, 7), (40, 1)),
    ((3, 200), (3, 1)),
    ((1, 1, 3, 3), (1, 1, 1, 1)),
    ((4, 3, 8), (4, 3, 1)),
]


@pytest.fixture(autouse=True)
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 24 values, so that these weights have several along both of their sides."""
    monkeypatch.setattr(quantize_weight, "_SMALL", 0)
    monkeypatch.setattr(fake_quantize, "_PART", 24 // torch.get_num_threads())


def weight_of(shape: tuple[int, ...]) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=draws)
    # Some on the ends of the range and halfway between levels, of a step of 0.25.
    some = torch.rand(shape, generator=draws) < 0.2
    return torch.where(some, torch.randint(-10, 11, shape, generator=draws) * 0.125, w)


def steps_of(shape: tuple[int, ...]) -> Tensor:
    count = int(torch.tensor(shape).prod()) if shape else 1
    return torch.tensor([0.25, 0.5, 0.1, 0.25, 1.5]).repeat(count)[:count].view(shape)


def results(w: Tensor, scale: Tensor, lo: int, hi: int) -> list[Tensor]:
    """The result, and the gradients of weight and steps."""
    w = w.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    scale = scale.clone().requires_grad_()
    y = quantize(w, scale, lo, hi)
    (y * w.detach().cos()).sum().backward()
    assert w.grad is not None
    assert scale.grad is not None
    assert y.stride() == w.stride()
    return [y.detach(), w.grad, scale.grad]


def exact(w: Tensor, scale: Tensor, lo: int, hi: int) -> list[Tensor]:
    """The same by the formulas of LSQ (Esser et al. 2020, eq. 3), in float64; levels are those of float32."""
    levels, g = (w / scale), w.cos().double()
    y = levels.round().clamp(lo, hi).double()
    inside = (levels > lo) & (levels < hi)
    of_steps = torch.where(inside, y - levels.double(), y)
    return [y * scale.double(), g * inside, (g * of_steps).sum_to_size(scale.shape)]


@pytest.mark.parametrize(("shape", "steps"), SHAPES)
@pytest.mark.parametrize(("lo", "hi"), [(-8, 7), (-2, 1), (-128, 127)])
def test_tiles_compute_the_formulas(shape: tuple[int, ...], steps: tuple[int, ...], lo: int, hi: int) -> None:
    w, scale = weight_of(shape), steps_of(steps)
    for ours, reference in zip(results(w, scale, lo, hi), exact(w, scale, lo, hi), strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5)


def test_weights_in_other_orders_of_memory() -> None:
    w, scale = weight_of((6, 5, 3, 3)), steps_of((6, 1, 1, 1))
    expected = exact(w, scale, -8, 7)
    for other in (w.to(memory_format=torch.channels_last), w.transpose(0, 1).contiguous().transpose(0, 1)):
        for ours, reference in zip(results(other, scale, -8, 7), expected, strict=True):
            torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5)


def test_steps_of_input_channels_are_no_rows() -> None:
    """Values of one step do not lie side by side: these weights take the general way."""
    w, scale = weight_of((6, 5)), steps_of((1, 5))
    for ours, reference in zip(results(w, scale, -8, 7), exact(w, scale, -8, 7), strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5)


def test_only_weight_and_steps_are_kept_for_the_gradient() -> None:
    kept: list[Tensor] = []
    w, scale = weight_of((40, 7)).requires_grad_(), steps_of((40, 1)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantize(w, scale, -8, 7)
    assert {t.data_ptr() for t in kept} == {w.data_ptr(), scale.data_ptr()}


def test_recording_a_graph_changes_no_gradient() -> None:
    found = []
    for create_graph in (False, True):
        w, scale = weight_of((40, 7)).requires_grad_(), steps_of((40, 1)).requires_grad_()
        y = quantize(w, scale, -8, 7)
        found.append(torch.autograd.grad((y * y).sum(), (w, scale), create_graph=create_graph))
    torch.testing.assert_close(*found)
    assert all(gradient.requires_grad for gradient in found[1])


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fused_kernels_compute_the_formulas(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    if backend == "inductor" and not has_compiler():
        pytest.skip("there is no C++ compiler")
    torch.compiler.reset()
    kernels = FusedRowKernels(backend)
    monkeypatch.setattr(quantize_weight, "fused_row_kernels", lambda _: kernels)
    for shape, steps in SHAPES:
        w, scale = weight_of(shape), steps_of(steps)
        for ours, reference in zip(results(w, scale, -8, 7), exact(w, scale, -8, 7), strict=True):
            torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5)
