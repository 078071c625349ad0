"""Numbers as colors."""

from __future__ import annotations

import torch
from torch import Tensor


def heat(values: Tensor, *, most: float | None = None) -> Tensor:
    """A colored picture (3, H, W) in [0, 1] of nonnegative values (H, W).

    Args:
        values: finite.
        most: the value with the brightest color; None for the largest there is.
    """
    from matplotlib import colormaps

    top = float(values.max()) if most is None else most
    scaled = (values / top if top > 0 else torch.zeros_like(values)).clamp(0, 1)
    colors = torch.from_numpy(colormaps["magma"](scaled.double().cpu().numpy()))
    return colors[..., :3].permute(2, 0, 1).float()
