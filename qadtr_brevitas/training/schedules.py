"""Precision schedules: which precision a training step runs at.

A draw depends on (seed, step) only: every rank draws the same, and a resumed run draws what an uninterrupted one would.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from random import Random
from typing import Annotated

from pydantic import model_validator

from qadtr_brevitas.core.plugin import Field, PrecisionField, plugin
from qadtr_brevitas.core.precision import DEFAULT_BITS, Precision, parse_precisions
from qadtr_brevitas.core.seeding import derive_seed


class Schedule(ABC):
    """A schedule plug-in: chooses the precision, or precisions, of each training step."""

    choices: tuple[Precision, ...] = ()
    """The precisions that it chooses from, where that is a key of the recipe; each must be in `quant.precisions`."""

    @abstractmethod
    def precisions(self, step: int, *, seed: int, epoch: int, epochs: int) -> tuple[Precision, ...]:
        """Return the precisions of one step, usually one; the losses at several are averaged.

        Args:
            step: 0-based count of optimizer steps since the run began.
            seed: the recipe's seed.
            epoch: 0-based epoch of quantized training.
            epochs: epochs of quantized training in all.
        """

    @abstractmethod
    def possible(self) -> tuple[Precision, ...]:
        """Return every precision that a step may get; the model must have them."""

    def active(self, *, epoch: int, epochs: int) -> tuple[Precision, ...]:
        """Return the precisions that the steps of an epoch may get; arguments are those of `precisions`."""
        return self.possible()


Choices = Annotated[
    tuple[PrecisionField, ...],
    Field(
        min_length=1,
        description="precisions to choose from, e.g. [8, 4] or [w4a8, w2a8]; default: quant.precisions",
    ),
]
_ALL = parse_precisions(DEFAULT_BITS)


@plugin
class Uniform(Schedule):
    """One precision a step, all equally likely: dynamic bit-width training (QADT-R, eq. 2).

    Eq. 2 draws the pair (b_w, b_a) from Uniform(B), B a set of single numbers. Decision: one number for both, as in
    every table of the paper and in DWQ. The literal alternative, two independent draws, is `independent: true`; the
    model must then be converted for the pairs too, and their norm statistics recalibrated.
    """

    choices: Choices = _ALL
    independent: Annotated[bool, Field(description="draw weight and activation bits separately")] = False

    def precisions(self, step: int, *, seed: int, epoch: int, epochs: int) -> tuple[Precision, ...]:
        """Return one precision, drawn for this step; see `Schedule.precisions`."""
        random = _step_random(seed, step)
        drawn = random.choice(self.choices)
        if self.independent and not drawn.is_mixed:
            drawn = Precision(drawn.weight, random.choice(_uniform(self.choices)).act)
        return (drawn,)

    def possible(self) -> tuple[Precision, ...]:
        """Return the precisions that a step may get; see `Schedule.possible`."""
        return _pairs(self.choices) if self.independent else self.choices


@plugin
class Fixed(Schedule):
    """One precision throughout: standard quantization-aware training."""

    choice: Annotated[PrecisionField, Field(description="the precision, e.g. 4 or w4a8")] = Precision(4, 4)

    def precisions(self, step: int, *, seed: int, epoch: int, epochs: int) -> tuple[Precision, ...]:
        """Return the one precision; see `Schedule.precisions`."""
        return (self.choice,)

    def possible(self) -> tuple[Precision, ...]:
        """Return the precisions that a step may get; see `Schedule.possible`."""
        return (self.choice,)


@plugin
class Cycle(Schedule):
    """Each precision for some epochs in turn.

    The paper's Table 17 says 20 epochs for each of 5 precisions, which is twice its 50 epochs. Decision: by default
    the epochs of the run are divided into one equal stretch for each precision; `epochs_each: 20` is the literal
    alternative, which starts over after the last precision.
    """

    choices: Choices = _ALL
    epochs_each: Annotated[int | None, Field(ge=1, description="epochs at a time; null: all epochs, divided")] = None

    def precisions(self, step: int, *, seed: int, epoch: int, epochs: int) -> tuple[Precision, ...]:
        """Return the precision of this epoch; see `Schedule.precisions`."""
        turn = epoch * len(self.choices) // epochs if self.epochs_each is None else epoch // self.epochs_each
        return (self.choices[turn % len(self.choices)],)

    def possible(self) -> tuple[Precision, ...]:
        """Return the precisions that a step may get; see `Schedule.possible`."""
        return self.choices


@plugin
class Curriculum(Schedule):
    """One precision a step, all equally likely, from a set that grows (TriQDef, Guesmi et al. 2025: 32 and 8 first).

    The first `first` of the choices are there from the start; the others enter one after the other, at equal distances
    over a share `until` of the epochs, so that all are trained for the rest. The paper gives the order, but not when.
    """

    choices: Choices = _ALL
    first: Annotated[int, Field(ge=1, description="how many of the choices are trained from the start")] = 2
    until: Annotated[float, Field(gt=0, le=1, description="share of the epochs after which all are trained")] = 0.5

    def precisions(self, step: int, *, seed: int, epoch: int, epochs: int) -> tuple[Precision, ...]:
        """Return one precision of those that have entered; see `Schedule.precisions`."""
        return (_step_random(seed, step).choice(self.active(epoch=epoch, epochs=epochs)),)

    def possible(self) -> tuple[Precision, ...]:
        """Return the precisions that a step may get; see `Schedule.possible`."""
        return self.choices

    def active(self, *, epoch: int, epochs: int) -> tuple[Precision, ...]:
        """Return the precisions that have entered by an epoch."""
        later = len(self.choices) - self.first
        # A run of a single epoch trains all.
        share = min(1.0, epoch / (self.until * epochs)) if epochs > 1 else 1.0
        return self.choices[: self.first + math.floor(share * later + 1e-9)] if later > 0 else self.choices


@plugin
class Weighted(Schedule):
    """One precision a step, drawn with given weights, for instance to train low precisions more often."""

    choices: Choices = _ALL
    weights: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...], Field(description="one for each choice, e.g. [1, 1, 1, 1, 2.5]")
    ] = (1, 1, 1, 1, 1)

    @model_validator(mode="after")
    def _one_weight_each(self) -> Weighted:
        if len(self.weights) != len(self.choices):
            raise ValueError(f"{len(self.weights)} weights for {len(self.choices)} choices: give one weight for each")
        if sum(self.weights) <= 0:
            raise ValueError("all weights are 0: give at least one above 0")
        return self

    def precisions(self, step: int, *, seed: int, epoch: int, epochs: int) -> tuple[Precision, ...]:
        """Return one precision, drawn for this step; see `Schedule.precisions`."""
        return tuple(_step_random(seed, step).choices(self.choices, self.weights))

    def possible(self) -> tuple[Precision, ...]:
        """Return the precisions that a step may get; see `Schedule.possible`."""
        return self.choices


@plugin
class Sandwich(Schedule):
    """Highest, random and lowest precision in every step (Yu and Huang 2019), which costs three steps."""

    choices: Choices = _ALL

    def precisions(self, step: int, *, seed: int, epoch: int, epochs: int) -> tuple[Precision, ...]:
        """Return up to three precisions, highest first; see `Schedule.precisions`."""
        ordered = sorted(_uniform(self.choices), key=lambda p: (p.weight + p.act, p), reverse=True)
        ordered[1:1] = [p for p in self.choices if p.is_mixed]
        between = [_step_random(seed, step).choice(ordered[1:-1])] if len(ordered) > 2 else []
        return tuple(dict.fromkeys((ordered[0], *between, ordered[-1])))

    def possible(self) -> tuple[Precision, ...]:
        """Return the precisions that a step may get; see `Schedule.possible`."""
        return self.choices


def _step_random(seed: int, step: int) -> Random:
    return Random(derive_seed(seed, "precision", step))


def _pairs(choices: tuple[Precision, ...]) -> tuple[Precision, ...]:
    uniform = _uniform(choices)
    pairs = (Precision(weight.weight, act.act) for weight in uniform for act in uniform)
    return (*pairs, *(precision for precision in choices if precision.is_mixed))


def _uniform(choices: tuple[Precision, ...]) -> list[Precision]:
    """Return the precisions that are pairs of bit-widths, not mixed ones."""
    return [precision for precision in choices if not precision.is_mixed]
