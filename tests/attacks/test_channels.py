"""Attacks and patches on gray and on four-channel images."""

import pytest
import torch
from PIL import Image
from torch import nn

from qadtr_brevitas.attacks.base import PatchAttack
from qadtr_brevitas.attacks.drawing import as_rgb, as_rgba
from qadtr_brevitas.attacks.fake_quantize import fake_quantize
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.registry import ATTACKS
from qadtr_brevitas.core.seeding import generator

SMALL = {
    "a-qapa": [{"sizes": [4], "steps": 1, "universal": 0.5}, {"sizes": [4], "steps": 1, "init": "uniform"}],
    "autoattack": [{"eps": 0.5, "version": "fast"}],
    "dpr": [{"steps": 2, "size": 4}],
    "fgsm": [{}],
    "gap": [{"steps": 1, "size": 4, "brightness": 0.1}],
    "lavan": [{"steps": 1, "size": 4, "init": "image"}, {"steps": 1, "size": 4, "init": "uniform"}],
    "location-patch": [{"steps": 1, "size": 4, "center": None}],
    "mi-fgsm": [{"steps": 1}],
    "patch-auto": [{"version": "fast", "size": 4}],
    "pgd": [{"steps": 1}],
    "random-patch": [{"draws": 2, "size": 4}],
    "sparse-rs": [{"queries": 300, "size": 4}],
}


@pytest.fixture(params=[1, 4])
def channels(request):
    return request.param


@pytest.fixture
def model(channels):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 4)).eval()


@pytest.mark.parametrize(("name", "settings"), [(name, settings) for name in SMALL for settings in SMALL[name]])
def test_every_attack_takes_any_number_of_channels(model, channels, name, settings):
    images = torch.rand(8, channels, 12, 12, generator=generator(0))
    with torch.no_grad():
        labels = model(images).argmax(1)
    attack = ATTACKS.load(name)(**settings)
    if hasattr(attack, "run"):
        memory = {"memory": {}} if settings.get("universal") else {}
        assert attack.run(model, images, labels, generator=generator(0), **memory).shape == images.shape
    if isinstance(attack, PatchAttack):
        if getattr(attack, "target", None) is not None:
            attack = attack.with_settings(target=None)
        patch = attack.fit(model, images, labels)
        assert patch.channels == channels
        assert patch.apply(images, generator=generator(0)).shape == images.shape


def test_patch_files_keep_all_channels(channels, tmp_path):
    texture = fake_quantize(torch.rand(channels, 3, 4, generator=generator(0)), 8)
    path = Patch(texture=texture, mask=torch.ones(3, 4, dtype=torch.bool)).save(tmp_path / "patch")
    assert torch.equal(Patch.load(path).texture, texture)
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.mode == "RGBA"


def test_patches_of_other_channels_are_refused(channels):
    patch = Patch(texture=torch.zeros(channels, 2, 2), mask=torch.ones(2, 2, dtype=torch.bool), place=(0, 0))
    with pytest.raises(UsageError, match=f"{channels} channels .* 3"):
        patch.apply(torch.zeros(1, 3, 4, 4))


def test_gray_is_drawn_gray_and_of_many_channels_the_first_three():
    image = torch.rand(5, 2, 3, generator=generator(0))
    assert torch.equal(as_rgb(image[:1]), image[:1].expand(3, 2, 3))
    torch.testing.assert_close(as_rgb(image[:2])[2], image[:2].mean(0))
    assert torch.equal(as_rgb(image[:3]), image[:3])
    assert torch.equal(as_rgb(image), image[:3])
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert torch.equal(as_rgba(image[:1], mask)[3], mask.float())
