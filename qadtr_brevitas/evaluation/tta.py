"""Test-time augmentation (Krizhevsky et al. 2012): what a model says of several views of an image, averaged.

Certification holds for the average as for the model alone: each view is made of what a mask leaves visible. A patch
and a second mask rarely mislead all views at once, so more is proved (docs/results/certified.md), for one forward pass
per view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

from torch import Tensor
from torch.nn.functional import pad

TtaKind: TypeAlias = Literal["none", "flip", "shift", "flip-shift"]
"""Views: the image alone; also its mirror image; also moved by one pixel; both, moved and mirrored too."""

VIEWS: dict[TtaKind, tuple[tuple[bool, int], ...]] = {
    "none": ((False, 0),),
    "flip": ((False, 0), (True, 0)),
    "shift": ((False, 0), (False, 1)),
    "flip-shift": ((False, 0), (True, 0), (False, 1), (True, 1)),
}
"""Views of each kind: whether the image is mirrored, and by how many pixels it was moved right and down before."""


def averaged(model: Callable[[Tensor], Tensor], kind: TtaKind) -> Callable[[Tensor], Tensor]:
    """Return a model whose logits are the mean over the views of an image; for `none` the model itself.

    Args:
        model: images (n, C, H, W) in [0, 1] -> logits (n, classes).
        kind: the views.
    """
    if kind == "none":
        return model
    count = len(VIEWS[kind])
    return lambda images: sum((model(view) for view in _views(images, kind)), start=images.new_zeros(())) / count


def _views(images: Tensor, kind: TtaKind) -> Iterator[Tensor]:
    for mirrored, pixels in VIEWS[kind]:
        moved = _moved(images, pixels) if pixels else images
        yield moved.flip(3) if mirrored else moved


def _moved(images: Tensor, pixels: int) -> Tensor:
    """Images moved right and down; their first row and column are seen again where nothing came in."""
    return pad(images, (pixels, 0, pixels, 0), mode="replicate")[..., :-pixels, :-pixels]
