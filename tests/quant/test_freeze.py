"""Freezing: stock Brevitas modules that compute the same."""

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import DEFAULT_BITS
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze, get_precision
from tests.quant.conftest import SIZE, randomize_norms
from tests.quant.test_convert import Small


def assert_frozen_equals(model: SwitchableModel, precision: object, images: Tensor) -> nn.Module:
    frozen = freeze(model, precision)
    with at_precision(model, precision), torch.no_grad():
        assert torch.equal(frozen(images), model(images))
    return frozen


@pytest.mark.slow
@pytest.mark.parametrize("bits", DEFAULT_BITS)
def test_frozen_resnet_equals_the_switchable_one(model: SwitchableModel, images: Tensor, bits: int) -> None:
    before = get_precision(model)
    frozen = assert_frozen_equals(model, bits, images)
    assert get_precision(model) == before
    assert not [name for name, m in frozen.net.named_modules() if type(m).__module__.startswith("qadtr_brevitas.quant")]
    assert type(frozen.net.bn1) is nn.BatchNorm2d


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"first_last": "same"},
        {"first_last": "float"},
        {"narrow_range": False},
        {"per_channel": False},
        {"residual": "same"},
        {"norm": "switchable"},
    ],
)
def test_frozen_equals_with_every_option(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 16, 16)
    model = convert(
        randomize_norms(Small()).eval(), [32, 4, 2, "w4a8", "w2a32", "w32a5"], image_size=(16, 16), **settings
    )
    calibrate(model, [images])
    for precision in (32, 4, 2, "w4a8", "w2a32", "w32a5"):
        assert_frozen_equals(model, precision, images)


def test_frozen_relu6_keeps_its_limit() -> None:
    torch.manual_seed(0)
    model = convert(Small().eval(), image_size=(16, 16))
    images = torch.rand(4, 3, 16, 16)
    calibrate(model, [images])
    with torch.no_grad():
        model.net.act.act_quant.quantizer.thresholds["8"].fill_(50.0)
        model.net.stem.weight.mul_(30)
    assert_frozen_equals(model, 4, images)


@pytest.mark.slow
def test_frozen_state_dict_round_trip(model: SwitchableModel, images: Tensor) -> None:
    frozen, other = freeze(model, 4), freeze(model, 4)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(frozen.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(images), frozen(images))


def test_a_precision_the_model_does_not_have_is_refused(float_net: nn.Module) -> None:
    model = convert(float_net, [32, 4], image_size=SIZE)
    with pytest.raises(UsageError, match=r"precision 8.*32, 4"):
        freeze(model, 8)
