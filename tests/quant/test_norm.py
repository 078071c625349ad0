"""Norm layers: statistics per precision, shared or own affine, exact at 32 bit."""

import copy
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant import SwitchableModel, at_precision, convert, freeze, recalibrate_norms
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


def test_a_cumulative_mean_over_batches_is_kept_for_each_precision() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, momentum=None)
    net = nn.Sequential(norm, nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    model = convert(net, [32, 4], image_size=(6, 6)).train()
    batches = list(torch.rand(6, 4, 3, 6, 6).unbind())
    for precision, part in ((32, batches[:3]), (4, batches[3:])):
        with at_precision(model, precision), torch.no_grad():
            for batch in part:
                model(batch)
    with torch.no_grad():
        for batch in batches[:3]:
            norm(batch)
    found: SwitchableBatchNorm = model.net[0]
    torch.testing.assert_close(found.running_mean, norm.running_mean, rtol=0, atol=0)
    torch.testing.assert_close(found.running_var, norm.running_var, rtol=0, atol=0)
    expected = torch.stack([batch.mean((0, 2, 3)) for batch in batches[3:]]).mean(0)
    torch.testing.assert_close(found.branch(Precision(4, 4)).running_mean, expected)
    # What an older version wrote has no counters.
    state = {name: value for name, value in model.state_dict().items() if "branches.4.num_batches" not in name}
    assert len(state) == len(model.state_dict()) - 1
    model.load_state_dict(state)


def test_recalibration_of_a_norm_that_is_called_twice_is_the_mean_over_calls() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv, self.head = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(3 + self.conv(self.norm(x))).mean((2, 3)))

    torch.manual_seed(0)
    model = convert(Shared(), [32, 4], image_size=(6, 6)).eval()
    seen: list[Tensor] = []
    handle = model.net.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean((0, 2, 3))))
    recalibrate_norms(model, torch.rand(3, 4, 3, 6, 6).unbind(), precisions=[4])
    handle.remove()
    assert len(seen) == 6
    torch.testing.assert_close(model.net.norm.branch(Precision(4, 4)).running_mean, torch.stack(seen).mean(0))


def test_synchronized_norms_have_statistics_per_precision() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    net = convert_sync_batchnorm(nn.Sequential(body, nn.Flatten(), nn.Linear(16, 2)))
    assert [type(module).__name__ for module in net[0]][1::2] == ["SyncBatchNormAct", "SyncBatchNorm"]
    model = convert(net.eval(), [32, 4], image_size=(6, 6))
    assert len(norms(model)) == 2
    images = torch.rand(4, 3, 6, 6)
    with torch.no_grad():
        assert torch.equal(model(images), net(images))
        before = norms(model)[1].running_mean.clone()
        with at_precision(model.train(), 4):
            model(images)
    assert torch.equal(norms(model)[1].running_mean, before)
    assert not torch.equal(norms(model)[1].branch(Precision(4, 4)).running_mean, before)
    frozen = freeze(model.eval(), 4)
    with at_precision(model, 4), torch.no_grad():
        torch.testing.assert_close(frozen(images), model(images))


def test_a_single_image_whose_channels_have_one_value_trains() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 6), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    model = convert(net, [32, 4], image_size=(6, 6)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for precision in (32, 4):
        with at_precision(model, precision):
            model(torch.rand(1, 3, 6, 6)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.net[0].weight.grad.any()
    with pytest.raises(ValueError, match="more than 1 value"):
        net.train()(torch.rand(1, 3, 6, 6))


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


@pytest.mark.parametrize("to_sync", [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_norms_that_would_lose_their_statistics_are_refused_and_kept(model: SwitchableModel, to_sync: Any) -> None:
    before = model.state_dict()
    with pytest.raises(UsageError, match=r"convert_sync_batchnorm.*statistics.*float network"):
        to_sync(model)
    assert model.state_dict().keys() == before.keys()
    assert len(norms(model)) == 19


def test_a_copy_of_a_converted_model_keeps_its_branches(model: SwitchableModel) -> None:
    copied = copy.deepcopy(model)
    assert [list(norm.branches) for norm in norms(copied)] == [["8", "5", "4", "2"]] * 19
