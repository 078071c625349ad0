"""The adaptive attack on a defense by double masking: a patch where the two-mask test fails.

A patch wins against Algorithm 1 of PatchCleanser if the masks that do not cover it agree on a wrong class, and each
mask that covers it, and so shows the right one, is contradicted by a second mask. Which masks are contradicted is known
from the image without a patch, because a mask over the patch hides it: the place is chosen by that, and only the
texture has to be searched. An image without such a place is attacked where the fewest masks stand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qadtr_brevitas.attacks.geometry import paste
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.patch_size import PatchSize, PatchSizeLike
from qadtr_brevitas.evaluation.defended import DefendedModel
from qadtr_brevitas.evaluation.masked_predictor import MaskedPredictor
from qadtr_brevitas.evaluation.masks import covered_places
from qadtr_brevitas.evaluation.tta import averaged


@dataclass(frozen=True)
class AdaptivePatches:
    """What the attack made.

    Args:
        images: (N, C, H, W) in [0, 1], patched.
        corners: (N, 2), row and column of each patch's upper left corner.
        standing: (N,), masks over the patch that no second mask contradicts; where there is one, the defense can tell.
    """

    images: Tensor
    corners: Tensor
    standing: Tensor


def adaptive_patches(
    network: DefendedModel,
    images: Tensor,
    labels: Tensor,
    *,
    size: PatchSizeLike | None = None,
    steps: int = 50,
    step_size: float = 0.05,
    masks_per_step: int = 6,
    generator: torch.Generator,
) -> AdaptivePatches:
    """Patch each image where the two-mask test fails, with a texture that fools the masks that do not cover it.

    Args:
        network: a defended model under double masking, in eval mode, at the precision to attack, weights frozen.
        images: (N, C, H, W) in [0, 1], on the device of the network.
        labels: (N,), the true classes.
        size: of the patch; None for the size that is defended against.
        steps: sign steps of the texture.
        step_size: in pixel values.
        masks_per_step: masks that a step averages over; each is one forward and backward pass of all images.
        generator: draws start and masks, on the CPU.

    Raises:
        UsageError: the defense is not double masking.
    """
    if network.certification.method != "double masking":
        raise UsageError(
            f"the attack looks for second masks, and {network.certification} has none: attack it with per-image patches"
        )
    patch = network.certification.size if size is None else PatchSize.parse(size)
    masks = network.certification.covering((images.shape[2], images.shape[3])).to(images.device)
    fill = network.fill.to(images.device)
    model = averaged(network.model, network.certification.tta)
    predictor = MaskedPredictor(model, images, masks, fill, network.batch_size)
    under_pairs = _classes_under_pairs(predictor)
    places = covered_places(masks, patch)
    kinds, number = places.flatten(0, 1).unique(dim=0, return_inverse=True)
    # A mask stands if it shows the right class beside every second mask, itself among them.
    stands = (under_pairs == labels[:, None, None]).all(dim=2)
    standing = (stands[:, None] & kinds).sum(dim=2)
    # Of equally good places that under the fewest masks: the patch is seen by more.
    chosen = (standing * (len(masks) + 1) + kinds.sum(dim=1)).argmin(dim=1)
    corners = torch.stack([_middle(number == kind, places.shape[1]) for kind in chosen])
    target = _wrong_class(under_pairs, kinds[chosen], labels)
    texture = torch.rand(*images.shape[:2], patch.height, patch.width, generator=generator).to(images.device)
    shape = torch.ones(patch.height, patch.width, dtype=torch.bool, device=images.device)
    # Any mask that does not cover the patch of its image.
    weights = (~kinds[chosen]).float().cpu().clamp(min=1e-9)
    for _ in range(steps):
        texture.requires_grad_()
        loss = images.new_zeros(())
        for _ in range(masks_per_step):
            drawn = torch.multinomial(weights, 1, generator=generator)[:, 0].to(images.device)
            seen = fill.cover(paste(images, texture, shape, corners), masks[drawn][:, None])
            loss = loss + cross_entropy(model(seen), target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, texture)
        texture = (texture.detach() - step_size * gradient.sign()).clamp(0, 1)
    patched = paste(images, texture.detach(), shape, corners)
    return AdaptivePatches(patched, corners, standing.gather(1, chosen[:, None])[:, 0])


def _classes_under_pairs(predictor: MaskedPredictor) -> Tensor:
    """(N, M, M) classes under every two masks; a pair is seen once."""
    count, masks = len(predictor.images), len(predictor.masks)
    device = predictor.images.device
    first, second = torch.triu_indices(masks, masks, device=device)
    images = torch.arange(count, device=device).repeat_interleave(len(first))
    found = predictor.under(images, first.repeat(count), second.repeat(count)).view(count, -1)
    classes = found.new_empty(count, masks, masks)
    classes[:, first, second] = found
    classes[:, second, first] = found
    return classes


def _middle(which: Tensor, width: int) -> Tensor:
    """(2,) row and column of the middle one of some places in reading order."""
    found = which.nonzero()[:, 0]
    place = found[len(found) // 2]
    return torch.stack([place // width, place % width])


def _wrong_class(under_pairs: Tensor, over: Tensor, labels: Tensor) -> Tensor:
    """(N,) the wrong class that masks over the patch (N, M) show most often beside a second one; else any other."""
    classes = int(max(int(under_pairs.max()), int(labels.max()), 1)) + 1
    votes = torch.zeros(len(labels), classes, device=labels.device)
    votes.scatter_add_(1, under_pairs.flatten(1), over[:, :, None].expand_as(under_pairs).flatten(1).float())
    everywhere = torch.zeros_like(votes).scatter_add_(
        1, under_pairs.flatten(1), torch.ones_like(votes[:, :1]).expand(-1, under_pairs[0].numel())
    )
    # Classes that only other masks show come after those.
    votes = votes + everywhere / (1 + everywhere.sum(dim=1, keepdim=True))
    return votes.scatter(1, labels[:, None], -1.0).argmax(dim=1)
