"""Coordinate descent on the levels of weights (Behdin et al. 2023; Nair and Suggala 2024)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.quant.layerwise import LayerwiseRounding, RoundingProblem

# Columns whose changes are passed on at once to the columns after them.
_BLOCK = 128


@plugin
class CoordinateDescent(LayerwiseRounding):
    """Move one weight after another to the level that is best given all others, until none moves.

    It starts from the levels that are there: after `gptq` in the list, from those of GPTQ. The error of a layer never
    grows. Sources: QuantEase (Behdin et al. 2023, https://arxiv.org/abs/2309.01885) and CDQuant (Nair and Suggala 2024,
    https://arxiv.org/abs/2406.17542).
    """

    sweeps: Annotated[int, Field(ge=1, description="at most so many times over all weights of a layer")] = 20

    def choose(self, problem: RoundingProblem) -> Tensor:
        levels, moments = problem.start.clone(), problem.moments
        own = moments.diagonal().clone()
        # Inputs that are always 0 leave their weights at the level that is there.
        inverse = torch.where(own > 0, 1 / own, 0)
        for _ in range(self.sweeps):
            # Computed anew, so that float rounding does not add up.
            gradient = (levels * problem.step - problem.target) @ moments
            if not self._sweep(problem, levels, gradient, inverse):
                break
        return levels

    @staticmethod
    def _sweep(problem: RoundingProblem, levels: Tensor, gradient: Tensor, inverse: Tensor) -> bool:
        """Move each weight once, in place; return whether one moved."""
        moved = False
        for start in range(0, len(inverse), _BLOCK):
            stop = min(start + _BLOCK, len(inverse))
            changes = torch.zeros_like(levels[:, start:stop])
            for j in range(start, stop):
                step = problem.step[:, j]
                best = (levels[:, j] - gradient[:, j] * inverse[j] / step).round().clamp(*problem.levels)
                change = (best - levels[:, j]) * step
                levels[:, j] = best
                changes[:, j - start] = change
                gradient[:, j:stop].addr_(change, problem.moments[j, j:stop])
            gradient[:, stop:].addmm_(changes, problem.moments[start:stop, stop:])
            moved = moved or bool(changes.any())
        return moved
