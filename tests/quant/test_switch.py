"""Switching: what it changes, and all that it must leave alone."""

import copy
import time

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import DEFAULT_BITS, Precision
from qadtr_brevitas.quant import (
    SwitchableModel,
    allowed_precisions,
    at_precision,
    frozen_weights,
    get_precision,
    quantizer_parameters,
    set_precision,
)
from qadtr_brevitas.quant.switch import precisions_or_all

pytestmark = pytest.mark.slow


def outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        result = {}
        for precision in allowed_precisions(model):
            with at_precision(model, precision):
                result[str(precision)] = model(images)
    return result


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def test_precisions_compute_different_things_and_come_back(model: SwitchableModel, images: Tensor) -> None:
    first = outputs(model, images)
    assert len({tuple(logits.flatten().tolist()) for logits in first.values()}) == len(DEFAULT_BITS)
    assert_same(first, outputs(model, images))


def test_switching_changes_no_parameter_or_buffer(model: SwitchableModel) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for bits in DEFAULT_BITS:
        set_precision(model, bits)
    assert_same(before, model.state_dict())


def test_a_precision_that_is_not_allowed_is_refused_and_nothing_switches(model: SwitchableModel) -> None:
    with pytest.raises(UsageError, match=r"precision 6.*32, 8, 5, 4, 2"):
        set_precision(model, 6)
    with pytest.raises(UsageError, match="w4a8"):
        precisions_or_all(model, [2, "w4a8"])
    assert get_precision(model) == Precision(32, 32)


def test_a_float_model_is_refused(float_net: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"ResNet.*not a switchable model.*convert\(\)"):
        set_precision(float_net, 4)


def test_at_precision_restores_even_after_an_error(model: SwitchableModel) -> None:
    with pytest.raises(UsageError, match=r"\(1, 2, 8, 8\).*3 channels"), at_precision(model, 4):
        model(torch.zeros(1, 2, 8, 8))
    assert get_precision(model) == Precision(32, 32)


def test_switching_takes_microseconds(model: SwitchableModel) -> None:
    start = time.process_time()
    for _ in range(100):
        set_precision(model, 4)
        set_precision(model, 2)
    assert (time.process_time() - start) / 200 < 1e-3


def test_a_deep_copy_is_equal_and_independent(model: SwitchableModel, images: Tensor) -> None:
    copied = copy.deepcopy(model)
    assert_same(outputs(model, images), outputs(copied, images))
    set_precision(copied, 2)
    assert get_precision(model) == Precision(32, 32)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(outputs(model, images)["4"], outputs(copied, images)["4"])


def test_state_dict_round_trip_keeps_every_precision(model: SwitchableModel, images: Tensor) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.add_(1)
    other.load_state_dict(model.state_dict(), strict=True)
    assert_same(outputs(model, images), outputs(other, images))


def test_loading_keeps_parameters_the_same_objects(model: SwitchableModel) -> None:
    # Brevitas makes new scale parameters on every load; an optimizer would go on with dead ones.
    before = [id(p) for p in model.parameters()]
    model.load_state_dict(model.state_dict())
    assert [id(p) for p in model.parameters()] == before


@pytest.mark.parametrize("bits", DEFAULT_BITS)
def test_gradients_are_finite_and_reach_only_the_current_precision(
    model: SwitchableModel, images: Tensor, bits: int
) -> None:
    model.train()
    set_precision(model, bits)
    images = images.clone().requires_grad_()
    model(images).square().sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(model.get_parameter(name).grad.isfinite().all() for name in with_grad)
    thresholds = {name for name in with_grad if "thresholds" in name}
    assert {name.rsplit(".", 1)[1] for name in thresholds} == ({str(bits), "8"} if bits != 32 else set())
    assert {name for name, _ in model.named_parameters() if "thresholds" not in name} <= with_grad


@pytest.mark.parametrize("bits", DEFAULT_BITS)
def test_frozen_weights_give_the_same_numbers_and_input_gradients(
    model: SwitchableModel, images: Tensor, bits: int
) -> None:
    def run() -> tuple[Tensor, Tensor]:
        x = images.clone().requires_grad_()
        logits = model(x)
        return logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]

    with at_precision(model, bits):
        plain = run()
        with frozen_weights(model):
            frozen, again = run(), run()
    torch.testing.assert_close(frozen, plain, rtol=0, atol=0)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_frozen_weights_follow_a_switch_inside(model: SwitchableModel, images: Tensor) -> None:
    expected = outputs(model, images)
    with frozen_weights(model):
        assert_same(outputs(model, images), expected)
        assert_same(outputs(model, images), expected)


def test_frozen_weights_leave_no_gradient_and_restore_trainability(model: SwitchableModel, images: Tensor) -> None:
    model.net.linear.bias.requires_grad_(False)
    with at_precision(model, 4), frozen_weights(model):
        x = images.clone().requires_grad_()
        model(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["net.linear.bias"]


def test_quantizer_parameters_are_the_thresholds(model: SwitchableModel) -> None:
    expected = [p for name, p in model.named_parameters() if ".thresholds." in name]
    assert {id(p) for p in quantizer_parameters(model)} == {id(p) for p in expected}
    # 18 inner convolutions and their inputs at 4 bit-widths; at 8 bit alone: weight and input of the first and the
    # last layer, and the residual stream between 9 blocks. The last block's output is read by the pool.
    assert len(expected) == (18 + 18 + 1) * 4 + 4 + 9
