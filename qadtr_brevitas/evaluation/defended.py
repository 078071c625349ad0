"""A model whose answer is the defended prediction, so that attacks run against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils.checkpoint import checkpoint

from qadtr_brevitas.core.files import fingerprint_facts
from qadtr_brevitas.evaluation.certification import Certification, masks_fingerprint
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.mask_fill import MaskFill
from qadtr_brevitas.evaluation.masked_predictor import Certified
from qadtr_brevitas.evaluation.masks import mean_color
from qadtr_brevitas.quant import at_precision, get_precision
from qadtr_brevitas.quant.compiled import repeating

_LIFT = 1e-3


class DefendedModel(nn.Module):
    """A switchable model behind a defense by masks; it switches precisions as the model does.

    The class of the highest output is the defended prediction. The outputs are the logits of the model, their mean over
    the masks of the first round and the views of test-time augmentation, and gradients flow through all of these to the
    images: an attack on this module sees the defense (an expectation over masks) and not only the network. Where the
    defense decides for another class than that mean does, its output is lifted just above the others.

    Args:
        model: a switchable model, in eval mode.
        certification: the defense.
        mean: the model's mean color.
        batch_size: masked images in one forward pass.

    Attributes:
        color: (C, 1, 1) in [0, 1], the mean color.
    """

    def __init__(
        self, model: nn.Module, certification: Certification, *, mean: Sequence[float], batch_size: int = 256
    ) -> None:
        super().__init__()
        self.model, self.certification, self.batch_size = model, certification, batch_size
        self.color = mean_color(mean)

    @property
    def fill(self) -> MaskFill:
        """What masks show."""
        return MaskFill(self.color, self.certification.fill)

    def decide(self, images: Tensor, *, prove: bool = True) -> Certified:
        """Return defended predictions at the current precision, and which of them are proved.

        Args:
            images: (N, C, H, W) in [0, 1].
            prove: whether to prove predictions; without, it is faster.
        """
        return self.certification.run(
            self._remembering_nothing, images, color=self.color, batch_size=self.batch_size, prove=prove
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return outputs (N, classes) whose highest is the defended prediction; see the class."""
        found = self.decide(images, prove=False)
        assert found.logits is not None
        logits, chosen = found.logits, found.defended.to(images.device)
        with torch.no_grad():
            highest = logits.amax(dim=1)
            gap = highest - logits.gather(1, chosen[:, None])[:, 0]
            lift = torch.where(logits.argmax(dim=1) == chosen, 0.0, gap + _LIFT * (1 + highest.abs()))
        return logits + one_hot(chosen, logits.shape[1]) * lift[:, None]

    def _remembering_nothing(self, images: Tensor) -> Tensor:
        """Run the model; what gradients need is computed again for them, or all masks would fill the memory at once."""
        if not (torch.is_grad_enabled() and images.requires_grad):
            with repeating(self.model):
                return self.model(images)
        precision = get_precision(self.model)

        def run(images: Tensor) -> Tensor:
            # Gradients are computed when the caller may have left its precision.
            with at_precision(self.model, precision):
                return self.model(images)

        return checkpoint(run, images, use_reentrant=False)


def defended(loaded: LoadedModel, certification: Certification, *, batch_size: int = 256) -> LoadedModel:
    """Return the defended classifier of a model as a model of its own: patches and attacks meet it like any other.

    Args:
        loaded: the model.
        certification: the defense.
        batch_size: masked images in one forward pass.

    Raises:
        UsageError: the patch does not fit on the model's images.
    """
    masks = masks_fingerprint(certification, loaded.info.mean, loaded.info.image_size)
    return replace(
        loaded,
        name=f"{loaded.name} defended ({certification})",
        model=DefendedModel(loaded.model, certification, mean=loaded.info.mean, batch_size=batch_size),
        fingerprint=fingerprint_facts(["defended", loaded.fingerprint, str(certification), masks]),
    )
