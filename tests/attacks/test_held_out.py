import pytest
import torch
from torch import nn

from qadtr_brevitas.attacks.held_out import HeldOut, as_float
from qadtr_brevitas.core.errors import DataError, UsageError

IMAGES = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 1, 1)


def test_as_float():
    images = torch.tensor([0, 255], dtype=torch.uint8)
    assert as_float(images).tolist() == [0, 1]
    assert images.tolist() == [0, 255]


def one_hot(images):
    """Classifies an image by its first value."""
    return nn.functional.one_hot(images[:, 0, 0, 0].long(), 8).float()


def test_held_out_images_count_if_right_and_not_of_the_target():
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0])
    targeted = HeldOut.select(one_hot, IMAGES, labels, target=3, batch_size=3)
    assert targeted.labels.tolist() == [0, 1, 2, 4, 5]
    untargeted = HeldOut.select(one_hot, IMAGES, labels, target=None, batch_size=3)
    assert untargeted.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert targeted.success_rate(one_hot, lambda x: torch.full_like(x, 3), batch_size=2) == 1
    assert targeted.success_rate(one_hot, lambda x: torch.full_like(x, 2), batch_size=2) == 0
    assert untargeted.success_rate(one_hot, lambda x: torch.full_like(x, 2), batch_size=2) == pytest.approx(5 / 6)


def test_no_image_counts_or_the_target_is_out_of_range():
    with pytest.raises(DataError, match="classifies no held-out image correctly"):
        HeldOut.select(one_hot, IMAGES, torch.arange(8).roll(1), target=3, batch_size=8)
    with pytest.raises(UsageError, match=r"8.*0 to 7"):
        HeldOut.select(one_hot, IMAGES, torch.arange(8), target=8, batch_size=8)
