"""Range methods: how calibration chooses the threshold of a quantizer from values that it observed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.quant.quantizer import SMALLEST_THRESHOLD, Levels, Quantizer
from qadtr_brevitas.quant.ranges import Sample, least_error, percentiles, thinned


@dataclass(frozen=True)
class LevelGrid:
    """The levels and the possible thresholds of a quantizer at one bit-width.

    Args:
        scheme: how values map to levels.
        levels: lowest and highest integer level.
        limit: the highest threshold, as 6 for ReLU6; None for no limit.
    """

    scheme: Quantizer
    levels: Levels
    limit: float | None = None

    @property
    def steps(self) -> int:
        """The number of steps between 0 and the threshold."""
        return self.scheme.steps_per_threshold(self.levels)

    def above(self, magnitudes: Tensor) -> Tensor:
        """Return the lowest possible thresholds that do not clip these magnitudes, or else the limit.

        Args:
            magnitudes: of any shape, not negative; 0 gives the threshold of 1, since any step is exact for zeros.

        Returns:
            Positive thresholds of the same shape.
        """
        headroom = self.steps / self.scheme.reach(self.levels)
        wanted = (torch.where(magnitudes > 0, magnitudes, 1.0) * headroom).clamp(SMALLEST_THRESHOLD, self.limit)
        # Steps that were rounded to powers of two afterwards would clip up to 29 % of the range.
        return self.scheme.nearest_threshold(wanted, self.levels, limit=self.limit, above=True)


@plugin
class RangeMethod(ABC):
    """A rule that chooses thresholds from values: of a weight, or of the activations that a quantizer observed.

    A threshold is the largest magnitude that is not clipped; `LevelGrid.above` gives those that a quantizer can have.
    """

    needs_values: ClassVar[bool] = True
    """Whether the method looks at a sample of activations, not at their largest magnitude alone."""
    clips: ClassVar[bool] = True
    """Whether a threshold may clip values that were observed."""

    def reduced(self, sample: Sample) -> Sample:
        """Return what the thresholds of all bit-widths are chosen from: work that is done once per quantizer."""
        return sample

    @abstractmethod
    def thresholds(self, sample: Sample, grid: LevelGrid) -> Tensor:
        """Return a threshold for each row of a sample, (rows,): positive, of those that the grid has.

        Args:
            sample: what `reduced` returned; a row holds the values of one threshold, all of them may be 0. Activations
                have no columns unless `needs_values`.
            grid: the levels and the possible thresholds at one bit-width.
        """


@plugin
class MinMax(RangeMethod):
    """The largest magnitude that was observed: no value is clipped."""

    needs_values: ClassVar[bool] = False
    clips: ClassVar[bool] = False

    def thresholds(self, sample: Sample, grid: LevelGrid) -> Tensor:
        return grid.above(sample.largest)


@plugin
class Percentile(RangeMethod):
    """A percentile of the magnitudes (Wu et al. 2020); where it is 0, the largest magnitude."""

    percentile: Annotated[
        float, Field(gt=0, le=100, description="percent of the magnitudes that are not clipped; 100 is minmax")
    ] = 99.99

    def reduced(self, sample: Sample) -> Sample:
        found = percentiles(sample.rows, self.percentile)
        return replace(sample, largest=torch.where(found > 0, found, sample.largest))

    def thresholds(self, sample: Sample, grid: LevelGrid) -> Tensor:
        return grid.above(sample.largest)


@plugin
class Mse(RangeMethod):
    """The least squared quantization error at each bit-width, by a grid search (Banner et al. 2019, Choukroun 2019)."""

    def reduced(self, sample: Sample) -> Sample:
        return thinned(sample)

    def thresholds(self, sample: Sample, grid: LevelGrid) -> Tensor:
        return least_error(
            sample,
            grid.above(sample.largest),
            grid.levels,
            grid.steps,
            rounding=grid.scheme.round,
            halves=grid.scheme.doubling_thresholds,
        )
