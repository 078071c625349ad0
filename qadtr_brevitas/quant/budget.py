"""Bit-widths per layer with the least total error within a budget: a knapsack with one choice a layer, solved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from qadtr_brevitas.core.errors import UsageError

Unit: TypeAlias = Literal["B", "bop"]

_FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_TEXT = re.compile(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kMGT]?)(B|bop)s?\s*")
# Partial solutions that are kept; with more the costs are rounded up to shares of the budget.
_MOST = 1 << 18


@dataclass(frozen=True)
class Budget:
    """The most that a network may cost: bytes of its weights and statistics, or bit-operations for an image."""

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read 0.1MB, 80kB, 2.5Gbop.

        Raises:
            UsageError: it is something else.
        """
        match = _TEXT.fullmatch(text)
        try:
            amount = float(match[1]) * _FACTORS[match[2]] if match else 0.0
        except ValueError:
            amount = 0.0
        if match is None or amount <= 0:
            raise UsageError(
                f"the budget is {text!r}: give bytes, such as 0.1MB or 80kB, or bit-operations for an image, such as "
                "2.5Gbop"
            )
        return cls(amount, "B" if match[3] == "B" else "bop")

    def write(self, amount: float) -> str:
        """Return an amount as text of the kind that `parse` reads."""
        prefix = next((prefix for prefix in "TGMk" if amount >= _FACTORS[prefix]), "")
        return f"{amount / _FACTORS[prefix]:.6g}{prefix}{self.unit}"


@dataclass(frozen=True)
class Option:
    """One bit-width of a layer: what it costs, a whole number, and its error."""

    bits: int
    cost: int
    error: float


def choose_bits(layers: Mapping[str, Sequence[Option]], limit: int) -> dict[str, int] | None:
    """Return the bit-width of each layer with the least sum of errors whose costs are at most a limit.

    The solution is exact: partial solutions are dropped only where another costs no more and has no larger error. Where
    more than a quarter of a million remain, costs are rounded up to parts of the limit, which is kept all the same.

    Args:
        layers: the options of each layer, at least one.
        limit: the most that all may cost together.

    Returns:
        Bit-widths by layer; None where even the cheapest ones cost more.
    """
    least = {name: min(option.cost for option in options) for name, options in layers.items()}
    room = limit - sum(least.values())
    if room < 0:
        return None
    unit = 1
    while (found := _search(layers, least, room, unit)) is None:
        unit *= 4
    return found


def _search(
    layers: Mapping[str, Sequence[Option]], least: Mapping[str, int], room: int, unit: int
) -> dict[str, int] | None:
    """Return the best choice with costs above the least rounded up to units; None where that is too much to search."""
    costs, errors = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for name, options in layers.items():
        extra = [-(-(option.cost - least[name]) // unit) * unit for option in options]
        costs = np.concatenate([costs + cost for cost in extra])
        errors = np.concatenate([errors + option.error for option in options])
        kept = _undominated(costs, errors, room)
        before = len(costs) // len(options)
        steps.append((kept // before, kept % before))
        costs, errors = costs[kept], errors[kept]
        if len(costs) > _MOST:
            return None
    place = int(np.argmin(errors))
    found: dict[str, int] = {}
    for (name, options), (chosen, previous) in zip(reversed([*layers.items()]), reversed(steps), strict=True):
        found[name] = options[int(chosen[place])].bits
        place = int(previous[place])
    return {name: found[name] for name in layers}


def _undominated(costs: np.ndarray, errors: np.ndarray, room: int) -> np.ndarray:
    """Return the places of the solutions within the room that none is as cheap and as good as."""
    order = np.lexsort((errors, costs))
    order = order[costs[order] <= room]
    best = np.minimum.accumulate(errors[order])
    better = np.concatenate([[True], best[1:] < best[:-1]])
    return order[better]
