"""GPTQ: each weight's rounding error is made up for by the weights that are not rounded yet (Frantar et al. 2022)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.quant.layerwise import DAMPING, LayerwiseRounding, RoundingProblem, factor

# Columns whose errors are passed on at once to the columns after them.
_BLOCK = 128


@plugin
class Gptq(LayerwiseRounding):
    """Round weights one input after another, the largest input first; later weights make up for the errors.

    Source: Frantar et al. 2022, https://arxiv.org/abs/2210.17323, with its option act-order.
    """

    damping: Annotated[
        float, Field(gt=0, description="added to the diagonal of second moments, as a share of its mean")
    ] = DAMPING

    def choose(self, problem: RoundingProblem) -> Tensor:
        order = problem.moments.diagonal().argsort(descending=True, stable=True)
        lower = factor(problem.moments[order][:, order], self.damping)
        # Row j says how the weights after j make up for an error at j.
        passed = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        weight, step = problem.target[:, order], problem.step[:, order]
        levels = torch.empty_like(weight)
        for start in range(0, len(order), _BLOCK):
            stop = min(start + _BLOCK, len(order))
            errors = torch.empty_like(weight[:, start:stop])
            for j in range(start, stop):
                levels[:, j] = (weight[:, j] / step[:, j]).round().clamp(*problem.levels)
                error = (weight[:, j] - levels[:, j] * step[:, j]) / passed[j, j]
                weight[:, j:stop].addr_(error, passed[j, j:stop], alpha=-1)
                errors[:, j - start] = error
            weight[:, stop:].addmm_(errors, passed[start:stop, stop:], alpha=-1)
        return levels[:, order.argsort()]
