"""Changes to training images: pixel for pixel those of timm's own training transform for the same random draws."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor

from qadtr_brevitas.config.sections import TransformSection
from qadtr_brevitas.data.transform import TrainingTransform, own_random_streams
from tests.data.support import picture

SIDE = 24
RAND = "rand-m9-mstd0.5-inc1"


def own(seed: int, **keys: Any) -> Tensor:
    """An image as a recipe with these keys changes it."""
    section = TransformSection(**keys)
    changes = section.model_dump(include={"scale", "flip", "rand_augment", "color_jitter"})
    with own_random_streams():
        return TrainingTransform(size=(SIDE, SIDE), **changes)(picture(1, (40, 50)), seed=seed)


def of_timm(seed: int, **keys: Any) -> Tensor:
    """The same by timm."""
    change = transforms_imagenet_train(SIDE, interpolation="bicubic", normalize=False, **keys)
    with own_random_streams():
        random.seed(seed), numpy.random.seed(seed), torch.manual_seed(seed)
        return change(picture(1, (40, 50)))


@pytest.mark.parametrize(
    ("keys", "timm_keys"),
    [
        ({}, {"color_jitter": 0.0}),
        ({"color_jitter": 0.4}, {"color_jitter": 0.4}),
        ({"rand_augment": RAND}, {"auto_augment": RAND, "color_jitter": 0.4}),
        (
            {"rand_augment": RAND, "color_jitter": 0.4, "force_color_jitter": True},
            {"auto_augment": RAND, "color_jitter": 0.4, "force_color_jitter": True},
        ),
    ],
)
def test_pixels_are_those_of_timm(keys: dict[str, Any], timm_keys: dict[str, Any]) -> None:
    images = [own(seed, **keys) for seed in range(12)]
    assert all(torch.equal(image, of_timm(seed, **timm_keys)) for seed, image in enumerate(images))
    assert len({image.numpy().tobytes() for image in images}) == 12


def test_rand_augment_at_its_greatest_strength() -> None:
    """It then keeps no bit of a picture, at which newer releases of Pillow raise an error within timm."""
    images = [own(seed, rand_augment="rand-m10-n3-inc1") for seed in range(60)]
    black = [seed for seed, image in enumerate(images) if not image.any()]
    assert black
    assert len(black) < 30
