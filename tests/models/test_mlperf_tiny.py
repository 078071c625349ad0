from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from qadtr_brevitas.data.image_folder import Cifar10
from qadtr_brevitas.models.mlperf_tiny import TinyResNet


def test_it_is_that_of_the_benchmark() -> None:
    model = timm.create_model("mlperf_tiny_resnet8").eval()
    assert isinstance(model, TinyResNet)
    assert sum(p.numel() for p in model.parameters()) == 78_186
    images = torch.rand(2, 3, 32, 32) * 255
    with torch.no_grad():
        assert torch.equal(model.forward_head(model.forward_features(images)), model(images))
        x = torch.rand(1, 16, 8, 8)
        # TensorFlow's SAME: a window begins at the first pixel, and reaches over the right and lower border.
        expected = F.conv2d(F.pad(x, (1, 1, 1, 1)), model.conv[3].weight, model.conv[3].bias)[:, :, 1::2, 1::2]
        assert torch.allclose(model.conv[3](model.pad(x)), expected, atol=1e-5)
    assert timm.create_model("mlperf_tiny_resnet8", num_classes=3)(images).shape == (2, 3)


@pytest.mark.slow
def test_published_weights_reach_their_accuracy(shared_data: Path, cifar10_root: Path) -> None:
    model = timm.create_model("mlperf_tiny_resnet8").eval()
    model.load_state_dict(load_file(shared_data / "resnet8_mlperf_tiny_cifar10.safetensors"))
    test = Cifar10(root=str(cifar10_root)).load("test")
    # Every tenth, because the images are sorted by class.
    images, labels = test.batch(torch.arange(0, len(test), 10))
    with torch.no_grad():
        found = int((model(images * 255).argmax(1) == labels).sum())
    # 87.19 % of all.
    assert 860 <= found <= 884
