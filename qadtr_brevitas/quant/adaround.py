"""Learned rounding, layer by layer: AdaRound (Nagel et al. 2020)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.quant.layerwise import LayerwiseRounding, RoundingProblem
from qadtr_brevitas.quant.relaxed_rounding import RelaxedLevels, distance_from_levels, exponent_at


@plugin
class AdaRound(LayerwiseRounding):
    """Learn whether each weight is rounded up or down, by the error of the outputs of its layer.

    The error is that of all images, by the second moments of the inputs, so that no minibatches are drawn. It starts
    from the levels that are there: after `gptq` in the list, from those of GPTQ.

    Source: Nagel et al. 2020, https://arxiv.org/abs/2004.10568; the activation behind a layer is not part of it.
    """

    steps: Annotated[int, Field(ge=1, description="optimizer steps for each layer")] = 500
    learning_rate: Annotated[float, Field(gt=0, description="of Adam, for the position between two levels")] = 0.1
    weight: Annotated[float, Field(gt=0, description="of the regularizer that drives weights to levels")] = 0.5

    def choose(self, problem: RoundingProblem) -> Tensor:
        relaxed = RelaxedLevels(problem.target / problem.step, problem.start, problem.levels)
        # In squared steps of one weight, at inputs of mean power: one weight of the regularizer suits all layers.
        unit = problem.moments.diagonal().mean() * problem.step.square().mean(1)
        with torch.enable_grad():
            optimizer = torch.optim.Adam([relaxed.v], lr=self.learning_rate)
            for step in range(self.steps):
                optimizer.zero_grad(set_to_none=True)
                loss = (problem.error(relaxed.relaxed()) / unit).sum()
                if (beta := exponent_at(step, self.steps)) is not None:
                    loss = loss + self.weight * distance_from_levels(relaxed.share(), beta)
                loss.backward()
                optimizer.step()
        return relaxed.rounded()
