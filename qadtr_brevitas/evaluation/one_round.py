"""A certifier of one round: masks of which one covers any two places of a patch, and a prediction they agree on.

CertMask (arXiv 2511.09834) answers after one round over masks that cover every place of a patch at least k times. Its
abstract leaves open what k has to be and how the masks vote, and the condition alone is not enough: if some two places
have no mask in common, a patch at one of them can make the masks that cover the other one agree on a wrong class, and
nothing tells this image from one of that class with a patch at the other place. Any rule of one round then is wrong on
one of the two. So the condition here is that every two places have a mask in common. It follows from CertMask's where
2k is more than the number of masks; the sets made here need far fewer hidden pixels for it.

Construction: windows as PatchCleanser's, q x q of them for a prime q, are the points of the affine plane of order q;
a mask is the union of the windows on one line. Any two points lie on a line, so q^2 + q masks do, and every place is
covered by k = q + 1 of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.patch_size import PatchSize, PatchSizeLike
from qadtr_brevitas.evaluation.mask_fill import MaskFill
from qadtr_brevitas.evaluation.masked_predictor import Certified, MaskedPredictor, plurality
from qadtr_brevitas.evaluation.masks import check_covers, covered_places, covering_set
from qadtr_brevitas.evaluation.patch_cleanser import UNPROVED

WINDOWS_PER_SIDE = 5
_ORDERS = (2, 3, 5, 7, 11, 13)


def line_masks(image_size: tuple[int, int], patch: PatchSizeLike, *, per_side: int = WINDOWS_PER_SIDE) -> Tensor:
    """Return boolean (M, H, W) masks of which one covers any two places of a patch.

    Args:
        image_size: (H, W) in pixels.
        patch: its size, as 5 or (3, 10).
        per_side: windows along each side, a prime number; M is at most per_side^2 + per_side.

    Raises:
        UsageError: the patch is larger than the image, or `per_side` is no prime up to 13.
    """
    check_per_side(per_side)
    windows = covering_set(image_size, patch, per_side=per_side)
    # Small images have fewer windows: points that are missing are left out of their lines.
    rows, columns = len(windows.rows), len(windows.columns)
    points = windows.masks.view(rows, columns, *image_size)
    steps = range(per_side)
    lines = [[(row, (slope * row + shift) % per_side) for row in steps] for slope in steps for shift in steps]
    lines += [[(row, column) for column in steps] for row in steps]
    inside = dict.fromkeys(frozenset((row, col) for row, col in line if row < rows and col < columns) for line in lines)
    # A line inside another one adds nothing.
    kept = [line for line in inside if line and not any(line < other for other in inside)]
    return torch.stack([torch.stack([points[point] for point in sorted(line)]).any(dim=0) for line in kept])


def check_per_side(per_side: int) -> None:
    """Check that windows along a side make lines of which any two windows share one.

    Raises:
        UsageError: `per_side` is no prime up to 13.
    """
    if per_side not in _ORDERS:
        allowed = ", ".join(map(str, _ORDERS))
        raise UsageError(
            f"one round takes a prime number of masks along each side, got {per_side}: choose from {allowed}"
        )


def place_kinds(masks: Tensor, patch: PatchSizeLike) -> Tensor:
    """Return the sets of masks that cover one place of a patch, boolean (kinds, M); check that any two share a mask.

    Args:
        masks: boolean (M, H, W).
        patch: its size.

    Raises:
        UsageError: no mask covers some place, or some two places together; they are named.
    """
    check_covers(masks, patch)
    places = covered_places(masks, patch)
    kinds, number = places.flatten(0, 1).unique(dim=0, return_inverse=True)
    apart = ((kinds.float() @ kinds.float().T) == 0).nonzero()
    if len(apart):
        first, second = (_first_place(number == kind, places.shape[1]) for kind in apart[0])
        raise UsageError(
            f"no mask covers a patch of {PatchSize.parse(patch)} pixels at {first} and one at {second} (row, column of "
            "the upper left corner) together, so that one round proves nothing: take the masks of line_masks()"
        )
    return kinds


def one_round(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    masks: Tensor,
    patch: PatchSizeLike,
    *,
    fill: MaskFill,
    batch_size: int = 256,
) -> Certified:
    """Defended predictions of images after one round over the masks, and which of them are proved.

    The prediction is the class on which all masks agree that cover some place: there is at most one such class, as any
    two places share a mask. If there is none, it is the class of most masks.

    A prediction is proved if all masks agree: wherever a patch lies, the masks over it still show the class.

    Args:
        model: images (n, C, H, W) in [0, 1] -> logits (n, classes), the same whenever it is asked; in eval mode, with
            its weights frozen.
        images: (N, C, H, W) in [0, 1].
        masks: boolean (M, H, W), as `line_masks` returns them.
        patch: its size.
        fill: what masks show.
        batch_size: masked images in one forward pass.

    Raises:
        UsageError: no mask covers some two places together.
    """
    kinds = place_kinds(masks, patch).to(images.device)
    predictor = MaskedPredictor(model, images, masks.to(images.device), fill.to(images.device), batch_size)
    logits = predictor.under_each()
    votes = logits.argmax(dim=2)
    majority = plurality(votes)
    # (N, kinds): the least and the highest class among the masks over each kind of place.
    least = torch.where(kinds, votes[:, None], votes.max() + 1).amin(dim=2)
    highest = torch.where(kinds, votes[:, None], -1).amax(dim=2)
    agreed = torch.where(least == highest, highest, -1).amax(dim=1)
    defended = torch.where(agreed >= 0, agreed, majority)
    unanimous = (votes == majority[:, None]).all(dim=1)
    proved = torch.where(unanimous, majority, UNPROVED)
    return Certified(defended.cpu(), proved.cpu(), predictor.passes.cpu(), logits.mean(dim=1))


def _first_place(which: Tensor, width: int) -> str:
    row, column = divmod(int(which.nonzero()[0, 0]), width)
    return f"{row},{column}"
