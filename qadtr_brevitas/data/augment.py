"""Random crops and mirror images of a whole batch at once."""

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(images: Tensor, *, padding: int = 4, flip: bool = True, generator: torch.Generator) -> Tensor:
    """Shifts each image by up to `padding` pixels and mirrors every second one, at random (He et al. 2016, 4.2).

    Args:
        images: (N, C, H, W), uint8 or float; pixels moved in from outside are 0 (black).
        padding: largest shift in pixels, in each direction.
        flip: whether to mirror left and right with probability 1/2.
        generator: the source of randomness; may lie on another device than the images.

    Returns:
        New images of the same shape and type.
    """
    count, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator, device=generator.device).to(
        images.device
    )
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    cropped = windows[torch.arange(count, device=images.device), :, top, left]
    if not flip:
        return cropped
    mirrored = torch.rand(count, generator=generator, device=generator.device).to(images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], cropped.flip(-1), cropped)
