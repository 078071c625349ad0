"""AutoAttack, by its authors' code in the package pyautoattack (an extra)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model, PixelAttack
from qadtr_brevitas.attacks.library import InputGradientModel, seeded
from qadtr_brevitas.attacks.pixel import Distance
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.extras import require
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import Precision

_TARGETS = 9
_LEAST_CLASSES = {"standard": 4, "rand": 3, "fast": 4}
_FAST_ATTACKS = ["apgd-ce", "apgd-t", "square"]
_FAST_STEPS, _FAST_TARGETS, _FAST_QUERIES = 25, 3, 300


@plugin
class AutoAttack(PixelAttack):
    """AutoAttack (Croce & Hein 2020), untargeted, in the maximum norm.

    `standard` runs APGD on cross-entropy, targeted APGD and targeted FAB against 9 classes (fewer where the network
    has fewer) and Square with 5,000 queries, each on the images that withstood the attacks before. `rand`, for networks
    that are random at inference, runs APGD on cross-entropy and DLR with 20 passes for each gradient. `fast` is none of
    the authors' versions but a check on weaker attacks: APGD of 25 steps on cross-entropy and against 3 classes, and
    Square with 300 queries.
    Images that are classified wrongly, or withstand all attacks, are returned unchanged.
    """

    eps: Distance = 0.03
    version: Annotated[
        Literal["standard", "rand", "fast"],
        Field(description="set of attacks; rand: for random networks; fast: a short one, not comparable with others'"),
    ] = "standard"

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
    ) -> Tensor:
        """Return images (N, C, H, W) in [0, 1] at most `eps` away.

        Warnings of AutoAttack go to the logger `auto-attack`.

        Raises:
            UsageError: pyautoattack is not installed, or the model has too few classes for the attacks' losses.
        """
        library = require("pyautoattack", extra="attacks", purpose="autoattack")
        input_only = InputGradientModel(model)
        with torch.no_grad():
            classes = input_only(images[:1]).shape[1]
        self._check_classes(classes)
        with seeded(generator, images.device) as seed:
            chosen = {"version": self.version}
            if self.version == "fast":
                chosen = {"version": "custom", "attacks": _FAST_ATTACKS}
            attack = library.AutoAttack(
                input_only, norm="Linf", eps=self.eps, device=images.device, seed=seed, **chosen
            )
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(_TARGETS, classes - 1)
            if self.version == "fast":
                _shorten(attack)
            adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
        return adversarial.detach()

    def _check_classes(self, classes: int) -> None:
        """Raise if the losses of these attacks need more classes than the model has."""
        if classes < _LEAST_CLASSES[self.version]:
            raise UsageError(
                f"autoattack version={self.version} needs {_LEAST_CLASSES[self.version]} classes or more, and the "
                f"model has {classes}: use pgd with restarts"
            )


def _shorten(attack: Any) -> None:
    """Spend less on each of the library's attacks."""
    attack.apgd.n_restarts = 1
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = _FAST_STEPS
    attack.apgd_targeted.n_target_classes = min(_FAST_TARGETS, attack.apgd_targeted.n_target_classes)
    attack.square.n_queries = _FAST_QUERIES
