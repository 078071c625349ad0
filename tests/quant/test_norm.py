"""Norm layers: statistics per precision, shared or own affine, exact at 32 bit."""

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant import SwitchableModel, at_precision, convert, recalibrate_norms
from qadtr_brevitas.quant.norm import SwitchableBatchNorm, norms
from qadtr_brevitas.quant.switch import Switch
from tests.quant.conftest import SIZE


def test_training_a_precision_moves_only_its_statistics(model: SwitchableModel, images: Tensor) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model.train()
    with at_precision(model, 4), torch.no_grad():
        model(images)
    changed = {k for k, v in model.state_dict().items() if k in before and not torch.equal(v, before[k])}
    assert changed == {k for k in before if ".branches.4." in k}


@pytest.mark.parametrize(("own_affine", "count"), [(False, 2), (True, 6)])
def test_affine_is_shared_or_own(own_affine: bool, count: int) -> None:
    switch = Switch([Precision(32, 32), Precision(4, 4), Precision(2, 2)])
    norm = SwitchableBatchNorm(nn.BatchNorm2d(3), switch, own_affine=own_affine)
    assert len(list(norm.parameters())) == count
    switch.set(4)
    norm(torch.randn(4, 3, 2, 2)).square().sum().backward()
    assert (norm.weight.grad is None) == own_affine


def test_recalibration_is_the_mean_over_batches(float_net: nn.Module, images: Tensor) -> None:
    model = convert(float_net, [32, 4], image_size=SIZE)
    first = norms(model)[0]
    seen: list[Tensor] = []
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean((0, 2, 3))))
    recalibrate_norms(model, [images, images[:2]], precisions=[4])
    handle.remove()
    torch.testing.assert_close(first.branch(Precision(4, 4)).running_mean, torch.stack(seen).mean(0))
    torch.testing.assert_close(first.running_mean, float_net.bn1.running_mean, rtol=0, atol=0)
    assert first.momentum == 0.1
    assert not any(m.training for m in model.modules())


def test_recalibration_needs_images(model: SwitchableModel) -> None:
    with pytest.raises(DataError, match="at least one batch"):
        recalibrate_norms(model, [])


def test_statistics_of_each_precision_make_outputs_unit_scaled(model: SwitchableModel, images: Tensor) -> None:
    # What goes wrong with shared statistics: the norm's output at 2 bit is then far from mean 0, variance 1.
    recalibrate_norms(model, [images])
    norm = model.net.layer1[0].bn1
    outputs: list[Tensor] = []
    norm.register_forward_hook(
        lambda module, _, y: outputs.append((y - module.bias.view(1, -1, 1, 1)) / module.weight.view(1, -1, 1, 1))
    )
    for bits in (32, 8, 4, 2):
        with at_precision(model, bits), torch.no_grad():
            model(images)
        assert outputs[-1].mean((0, 2, 3)).abs().max() < 0.05
        assert (outputs[-1].var((0, 2, 3)) - 1).abs().max() < 0.05
