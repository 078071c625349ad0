"""LaVAN: a patch that lowers the true class and raises a target class; one for all images, or one for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from qadtr_brevitas.attacks.engine import Descent
from qadtr_brevitas.attacks.per_image import Attempt, ImageAttackInputs, ImagePatch, search_patches
from qadtr_brevitas.attacks.starts import start_patches
from qadtr_brevitas.attacks.universal import SearchFields
from qadtr_brevitas.core.plugin import plugin


@plugin
class Lavan(SearchFields, ImagePatch):
    """LaVAN patch (Karmon et al. 2018, image domain): values in [0, 1], a place of its own in every image.

    Descends z_s - z_t, source minus target logit; untargeted (`target` null) z_s - max of the others.
    The paper follows the raw gradient with a constant step: `step_rule=sgd cosine=false`.

    `fit` makes one universal patch: the loss is averaged over a batch, places are drawn anew every step, and images
    of the target class are left out. `run` makes a patch for every image, which lies at one random place throughout
    the search; the best attempt at every image is kept. `batch_size` and `check_every` concern `fit` only. The pictures
    of `init=image` are other images of the batch there.

    On the published float CIFAR ResNet-20 the defaults end where 600 steps, `sgd` and `margin` end too (6x6 pixels,
    target 5: 42 to 44 % of 2,000 test images); `cross-entropy` stays about 3 points behind.
    """

    attack: ClassVar[str] = "lavan"

    def attempts(self, inputs: ImageAttackInputs) -> Iterator[Attempt]:
        """One search from each start, at places drawn anew."""
        problem = inputs.problem(self.target, loss=self.loss)
        descent = Descent(steps=self.steps, step_rule=self.step_rule, lr=self.step_size, cosine=self.cosine)
        for _ in range(self.restarts):
            corners = self.corners(
                len(inputs.images),
                inputs.image_size,
                inputs.size,
                generator=inputs.generator,
            )
            corners = corners.to(inputs.images.device)
            patches = start_patches(self.init, problem, corners, generator=inputs.generator)
            yield search_patches(problem, patches, corners, descent=descent)
