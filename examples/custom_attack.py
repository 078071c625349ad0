"""Write an attack, and score a network under it at every bit-width.

This one covers a square at a random place with the one color, of a few, that hurts most. It sees outputs only. In a
package of your own an entry point makes it known to every command: see third_party_plugin.
"""

from typing import Annotated

import torch
from digits_network import digits_network
from torch import Tensor
from torch.nn.functional import cross_entropy

import qadtr_brevitas as qb
from qadtr_brevitas.attacks.base import ImageAttack, Model
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.data.digits import Digits


@plugin
class WorstColor(ImageAttack):
    """Cover a square of each image with the color, of several random ones, that gives the highest loss."""

    size: Annotated[int, Field(ge=1, description="side of the square in pixels")] = 10
    colors: Annotated[int, Field(ge=1, description="colors that are tried")] = 8

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
    ) -> Tensor:
        """Return the images with their squares."""
        count, _, height, width = images.shape
        top = torch.randint(height - self.size + 1, (count,), generator=generator)
        left = torch.randint(width - self.size + 1, (count,), generator=generator)
        best, worst_loss = images, torch.full((count,), -torch.inf, device=images.device)
        for _ in range(self.colors):
            color = torch.rand(3, 1, 1, generator=generator).to(images.device)
            covered = images.clone()
            for index, (row, column) in enumerate(zip(top.tolist(), left.tolist(), strict=True)):
                covered[index, :, row : row + self.size, column : column + self.size] = color
            with torch.no_grad():
                loss = cross_entropy(model(covered), labels, reduction="none")
            is_worse = loss > worst_loss
            best = torch.where(is_worse[:, None, None, None], covered, best)
            worst_loss = torch.where(is_worse, loss, worst_loss)
        return best


def main(steps: int = 300, images: int = 200) -> qb.EvaluationResult:
    model = qb.convert(digits_network(steps=steps), precisions=[32, 8, 4])
    qb.calibrate(model, Digits().load("train"))
    result = qb.evaluate(model, Digits().load("test"), attacks=[WorstColor(size=12)], images=images)
    print(result)
    return result


if __name__ == "__main__":
    main()
