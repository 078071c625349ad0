"""Networks of any number of input channels."""

import pytest
import timm
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant import at_precision, calibrate, convert, freeze


class Grey(nn.Module):
    """LeNet's beginning and end."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.head = nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.Linear(6 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.max_pool2d(self.act(self.conv(x)), 6).flatten(1))


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("given", [True, False])
def test_images_of_any_number_of_channels(channels: int, given: bool) -> None:
    settings = {"mean": [0.1307] * channels, "std": [0.3081] * channels} if given else {}
    net = Grey(channels).eval()
    model = convert(net, [32, 4], image_size=(28, 28), **settings)
    assert model.channels == channels
    pixels = torch.rand(4, channels, 28, 28)
    calibrate(model, pixels)
    with torch.no_grad():
        assert torch.equal(model(pixels), net((pixels - model.mean) / model.std))
        with at_precision(model, 4):
            torch.testing.assert_close(freeze(model, 4)(pixels), model(pixels))
    with pytest.raises(UsageError, match=rf"\(4, 5, 28, 28\).*{channels} channel"):
        model(torch.rand(4, 5, 28, 28))


def test_a_network_without_convolutions_takes_its_channels_from_mean_or_std() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    assert convert(net, image_size=(28, 28), std=[0.5]).channels == 1
    with pytest.raises(UsageError, match=r"mean has 3 values.*std.* 1"):
        convert(net, image_size=(28, 28), mean=[0.5] * 3, std=[0.5])
    with pytest.raises(UsageError, match=r"std is \(0.0,\)"):
        convert(net, image_size=(28, 28), std=[0.0])


def test_a_grey_network_takes_color_images_as_their_mean() -> None:
    model = convert(Grey(1).eval(), [32, 4], image_size=(28, 28))
    pixels = torch.rand(4, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), model(pixels.mean(1, keepdim=True)), rtol=0, atol=0)
        torch.testing.assert_close(model(pixels[:, :1].expand(-1, 3, -1, -1)), model(pixels[:, :1]))


def test_a_first_convolution_may_read_rearranged_pixels() -> None:
    net = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    assert convert(net, image_size=(16, 16)).channels == 3


def test_channels_of_timm_networks() -> None:
    net = timm.create_model("test_resnet", in_chans=1, num_classes=5)
    model = convert(net, [32, 4], image_size=(32, 32))
    assert model.mean.shape == (1, 1, 1, 1)
    assert float(model.mean) == pytest.approx(sum(net.pretrained_cfg["mean"]) / 3)
