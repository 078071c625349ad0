import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qadtr_brevitas.attacks.fake_quantize import fake_quantize
from qadtr_brevitas.attacks.patch import Patch

VALUES = torch.linspace(0, 1, 10_001)


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_levels_and_formula(bits):
    rounded = fake_quantize(VALUES, bits)
    assert len(rounded.unique()) == 2**bits
    torch.testing.assert_close(rounded, (VALUES * (2**bits - 1)).round() / (2**bits - 1), rtol=0, atol=0)


def test_32_bit_changes_nothing():
    assert fake_quantize(VALUES, 32) is VALUES


def test_images_of_8_bit_are_on_the_8_bit_grid():
    images = torch.arange(256, dtype=torch.uint8).float() / 255
    assert torch.equal(fake_quantize(images, 8), images)


def test_the_gradient_passes_straight_through_inside_the_range_only():
    values = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.5], requires_grad=True)
    (gradient,) = torch.autograd.grad((fake_quantize(values, 2) * torch.arange(1.0, 6.0)).sum(), values)
    assert gradient.tolist() == [0, 2, 3, 4, 0]


@pytest.mark.parametrize("step_error", [-0.05, 0.01, 0.05])
def test_quantization_noise_moves_the_levels_but_not_their_number_or_range(step_error):
    rounded = fake_quantize(VALUES, 4, step_error=step_error)
    assert len(rounded.unique()) <= 16
    assert rounded.min() >= 0
    assert rounded.max() <= 1
    torch.testing.assert_close(rounded.unique()[1], torch.tensor((1 + step_error) / 15))


class CudaDivision(TorchDispatchMode):
    """Divides by numbers as CUDA does: by a product with the rounded reciprocal."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.div.Tensor, torch.ops.aten.div_.Tensor) and not isinstance(args[1], torch.Tensor):
            product = torch.ops.aten.mul if func is torch.ops.aten.div.Tensor else torch.ops.aten.mul_
            return product.Tensor(args[0], float(torch.tensor(1 / args[1])))
        return func(*args, **(kwargs or {}))


def test_levels_are_those_of_other_devices():
    levels = torch.arange(256.0) / 255
    with CudaDivision():
        rounded = torch.arange(256.0) / 255
        assert not torch.equal(rounded, levels)
        assert torch.equal(fake_quantize(rounded, 8), levels)
        patch = Patch(texture=levels.view(1, 16, 16).expand(3, -1, -1), mask=torch.ones(16, 16, dtype=torch.bool))
        assert torch.equal(patch.to("cpu").texture, patch.texture)
    Patch(texture=rounded.view(1, 16, 16).expand(3, -1, -1), mask=torch.ones(16, 16, dtype=torch.bool))
