"""The fused kernels of GPUs, lowered for the CPU here: the eager functions are the reference."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from qadtr_brevitas.core import device
from qadtr_brevitas.core.device import has_compiler
from qadtr_brevitas.quant import at_precision, fake_quantize, fused
from qadtr_brevitas.quant.fake_quantize import quantize_activation
from qadtr_brevitas.quant.fused import FusedKernels, fused_kernels, fused_on_cpu
from tests.training.support import calibrated_model

LEVELS = [(0, 15), (-2, 1), (-128, 127), (0, 3)]


def gradients(x: Tensor, lo: int, hi: int, *, keep_input: bool = True) -> list[Tensor]:
    """The result, and the gradients of x and of the step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    scale = torch.tensor(0.3, device=x.device, requires_grad=True)
    y = quantize_activation(x, scale, lo, hi, keep_input=keep_input)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    return [y.detach(), x.grad, scale.grad]


def agree(monkeypatch: pytest.MonkeyPatch, x: Tensor, kernels: FusedKernels, *, rtol: float = 1e-5) -> None:
    for keep_input in (True, False):
        for lo, hi in LEVELS:
            with monkeypatch.context() as patch:
                patch.setattr(fake_quantize, "fused_kernels", lambda _: kernels)
                ours = gradients(x, lo, hi, keep_input=keep_input)
            eager = gradients(x, lo, hi, keep_input=keep_input)
            assert torch.equal(ours[0], eager[0])
            assert torch.equal(ours[1], eager[1])
            torch.testing.assert_close(ours[2], eager[2], rtol=rtol, atol=1e-5)
            assert ours[0].stride() == eager[0].stride()


def tensors() -> list[Tensor]:
    """Of several shapes and layouts, with values on the ends of ranges and halfway between levels."""
    draws = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 5, 7, generator=draws)
    ends = torch.arange(-20, 20).repeat(2) * 0.15
    return [image, image.to(memory_format=torch.channels_last), image.transpose(2, 3), ends, image[0, 0]]


needs_compiler = pytest.mark.skipif(not has_compiler("cpu"), reason="there is no C++ compiler")


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])])
def test_kernels_are_the_eager_functions_and_one_graph_serves_all_shapes_and_levels(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    torch.compiler.reset()
    counters.clear()
    kernels = FusedKernels(backend)
    for x in tensors():
        agree(monkeypatch, x, kernels)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_bfloat16_is_computed_in_float32() -> None:
    x, step = tensors()[0].bfloat16(), torch.tensor(0.3)
    kernels = FusedKernels("eager")
    assert torch.equal(kernels.forward(x, step, 0, 15), kernels.forward(x.float(), step, 0, 15).bfloat16())


def test_kernels_are_fused_on_a_cpu_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2)
    assert fused_kernels(x) is None
    monkeypatch.setattr(fused, "_kernels", lambda device: device)
    with fused_on_cpu():
        assert fused_kernels(x) == x.device
        assert fused_kernels(x.double()) is None
    assert fused_kernels(x) is None


def test_a_gpu_without_triton_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    fused._kernels.cache_clear()
    with pytest.warns(UserWarning, match=r"cuda:0.*Triton") as warned:
        assert [fused._kernels(torch.device("cuda:0")) for _ in range(3)] == [None] * 3
    assert len(warned) == 1
    fused._kernels.cache_clear()


@pytest.mark.slow
@needs_compiler
def test_a_training_step_is_that_of_the_eager_quantizers() -> None:
    model = calibrated_model().train()
    images, found = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for context in (fused_on_cpu(), nullcontext()):
        torch.manual_seed(0)
        model.zero_grad()
        with context, at_precision(model, 4):
            model(images).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_a_gpu_computes_what_its_eager_functions_do(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    for x in tensors():
        x = x.cuda()
        kernels = fused_kernels(x)
        assert kernels is not None
        with monkeypatch.context() as patch:
            patch.setattr(fake_quantize, "fused_kernels", lambda _: None)
            eager = gradients(x, 0, 15)
        for ours, reference in zip(gradients(x, 0, 15), eager, strict=True):
            torch.testing.assert_close(ours, reference)
