"""Pictures for the browser: PNG files as data addresses."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from qadtr_brevitas.attacks.drawing import as_rgb, as_rgba

# The brightest hundredth of a gradient is white: a few pixels would otherwise leave the rest black.
_BRIGHT = 0.99


def image_address(image: Tensor) -> str:
    """Return an image (C, H, W) in [0, 1] as a data address."""
    return _address(as_rgb(image.detach().cpu()))


def patch_address(texture: Tensor, mask: Tensor) -> str:
    """Return a patch (C, h, w) as a data address, transparent outside its mask (h, w)."""
    return _address(as_rgba(texture.cpu(), mask.cpu()))


def gradient_address(gradient: Tensor) -> str:
    """Return the size of a gradient (C, H, W) at each pixel as a gray picture, brighter where it is larger."""
    sizes = gradient.detach().cpu().abs().nan_to_num(posinf=0.0).amax(dim=0)
    bright = torch.quantile(sizes.flatten(), _BRIGHT)
    scale = bright if bright > 0 else sizes.max().clamp(min=torch.finfo(sizes.dtype).tiny)
    return _address((sizes / scale).clamp(0, 1).expand(3, -1, -1))


def _address(pixels: Tensor) -> str:
    values = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    file = BytesIO()
    Image.fromarray(values).save(file, format="PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
