"""The options of certificates and of predictions defended by masks, which `evaluate` and `export` share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import click

from qadtr_brevitas.cli.common import option_block
from qadtr_brevitas.cli.option_values import PatchSizes
from qadtr_brevitas.core.patch_size import PatchSize

if TYPE_CHECKING:
    from qadtr_brevitas.evaluation.certification import Certification

MASK_OPTIONS = ("certify_masks", "certify_method", "certify_fill", "certify_tta", "certify_overlap")
"""Parameters of `mask_options`."""


class MaskValues(Protocol):
    """The masks of a command line, as click read them."""

    @property
    def certify_masks(self) -> int | None:
        """Masks along each side of an image; None for those of the method."""
        ...

    @property
    def certify_method(self) -> Literal["double-masking", "one-round"]:
        """What answers through them."""
        ...

    @property
    def certify_fill(self) -> Literal["mean", "interpolate"]:
        """What they show."""
        ...

    @property
    def certify_tta(self) -> Literal["none", "flip", "shift", "flip-shift"]:
        """Views that the logits are averaged over."""
        ...

    @property
    def certify_overlap(self) -> int:
        """Masks along each side over a place of the patch, whose logits are averaged."""
        ...


mask_options = option_block(
    click.option(
        "--certify-masks",
        type=click.IntRange(min=2),
        help="Masks along each side of an image; more prove more and take longer.  [default: 6, in one round 5]",
    ),
    click.option(
        "--certify-method",
        type=click.Choice(["double-masking", "one-round"]),
        default="double-masking",
        show_default=True,
        help="PatchCleanser's double masking, or one round of 30 passes under larger masks.",
    ),
    click.option(
        "--certify-fill",
        type=click.Choice(["mean", "interpolate"]),
        default="mean",
        show_default=True,
        help="What masks show: the mean color, as PatchCleanser does, or pixels interpolated from visible ones; best "
        "what train.masks.fill was.",
    ),
    click.option(
        "--certify-tta",
        type=click.Choice(["none", "flip", "shift", "flip-shift"]),
        default="none",
        show_default=True,
        help="Average the logits with those of the mirror image, of the image moved by a pixel, or of both (test-time "
        "augmentation): proves more, for 2 or 4 times the passes.",
    ),
    click.option(
        "--certify-overlap",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Average the logits under so many overlapping masks, along each side, that cover a place: 2 proves "
        "most, for 4 times the passes of a prediction and 16 times those of a proof.",
    ),
)
"""--certify-masks, --certify-method, --certify-fill, --certify-tta and --certify-overlap."""

certify_options = option_block(
    click.option(
        "--certify",
        metavar="SIZE[,SIZE...]",
        type=PatchSizes(),
        help="Prove which predictions no patch of this size can change, as 6 or 3x10; with 6 masks along a side, up to "
        "666 forward passes of each image.",
    ),
    mask_options,
    click.option(
        "--certify-images",
        type=click.IntRange(min=1),
        help="Certify so many of the test images only, balanced over classes; more later, or all, take up where these "
        "end.",
    ),
    click.option(
        "--defend",
        metavar="SIZE[,SIZE...]",
        type=PatchSizes(),
        help="Score the prediction defended against patches of this size too, as a model of its own: what is made on "
        "others, and on itself through the masks, meets it. Tens of forward passes for each.",
    ),
)
"""Those and --certify, --certify-images and --defend."""


def certification_of(given: MaskValues, size: PatchSize) -> Certification:
    """Return the masks that cover patches of a size."""
    from qadtr_brevitas.evaluation.certification import Certification

    method = "one round" if given.certify_method == "one-round" else "double masking"
    fill, tta = given.certify_fill, given.certify_tta
    return Certification(size, given.certify_masks, method, fill, tta, given.certify_overlap)
