"""LaVAN: a patch that lowers the true class and raises a target class; one for all images, or one for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from qadtr_brevitas.attacks.descent import OptimizerSteps
from qadtr_brevitas.attacks.per_image import PatchTask, PerImagePatch, search_patches
from qadtr_brevitas.attacks.results import AttackGoal, AttackResult
from qadtr_brevitas.attacks.starts import start_patches
from qadtr_brevitas.attacks.universal import UniversalPatch
from qadtr_brevitas.core.plugin import plugin


@plugin
class Lavan(UniversalPatch, PerImagePatch):
    """LaVAN patch (Karmon et al. 2018, image domain): values in [0, 1], a place of its own in every image.

    Descends z_s - z_t, source minus target logit; untargeted (`target` null) z_s - max of the others.
    The paper follows the raw gradient with a constant step: `step_rule=sgd cosine=false`.

    `fit` makes one universal patch: the loss is averaged over a batch, places are drawn anew every step, and images
    of the target class are left out. `run` makes a patch for every image, which lies at one random place throughout
    the search; the best result for every image is kept. `batch_size` and `check_every` concern `fit` only. In `run`,
    `init=image` starts from other images of the batch.

    On the published float CIFAR ResNet-20 the defaults end where 600 steps, `sgd` and `margin` end too (6x6 pixels,
    target 5: 42 to 44 % of 2,000 test images); `cross-entropy` stays about 3 points behind.
    """

    attack: ClassVar[str] = "lavan"

    def goal(self, labels: Tensor) -> AttackGoal:
        return AttackGoal.of(self.target, labels, loss=self.loss)

    def results(self, task: PatchTask, generator: torch.Generator) -> Iterator[AttackResult]:
        """Yield the result of one search for each restart, at places drawn anew."""
        rule = OptimizerSteps(steps=self.steps, step_rule=self.step_rule, lr=self.step_size, cosine=self.cosine)
        for _ in range(self.restarts):
            corners = self.draw_corners(task, generator)
            patches = start_patches(self.init, task, corners, generator=generator)
            yield search_patches(task.assess, patches, corners, rule=rule, steps=self.steps)
