"""How a switchable model is run: at one precision, or at several together.

A single precision is written `4`. Several are run as their mean, `8+4+2`, which is what an attack looks at to allow for
all of them (EOT); as a random draw for each image, `random(8+4+2)`, which is the random precision inference (RPI) of
DWQ (Fu et al. 2021); or as a majority vote, `vote(8+4+2)`, which is the ensemble of EMPIR (Sen et al. 2020).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision, PrecisionLike, parse_precisions
from qadtr_brevitas.quant import at_precision, precisions_or_all

Aggregation: TypeAlias = Literal["mean", "random", "vote"]
"""The mean of the logits, one precision drawn for each image, or the class that most precisions see."""

_ORDER: tuple[Aggregation, ...] = ("vote", "random", "mean")
_CALL = re.compile(r"(random|vote)\((.*)\)", flags=re.DOTALL)
# Commas that are not inside parentheses.
_COMMA = re.compile(r",(?![^(]*\))")


@dataclass(frozen=True)
class InferenceMode:
    """One precision, or several that are run together.

    Args:
        precisions: from many bits to few; usually one.
        aggregation: what is made of several.
    """

    precisions: tuple[Precision, ...]
    aggregation: Aggregation = "mean"

    @property
    def is_single(self) -> bool:
        """True for one precision, which needs nothing to be made of it."""
        return len(self.precisions) == 1

    @property
    def is_random(self) -> bool:
        """True where the same images may get other logits each time."""
        return self.aggregation == "random" and not self.is_single

    def __str__(self) -> str:
        names = "+".join(map(str, self.precisions))
        return names if self.aggregation == "mean" or self.is_single else f"{self.aggregation}({names})"


def parse_mode(value: PrecisionLike | InferenceMode | Sequence[Precision]) -> InferenceMode:
    """Reads one precision, or several as "8+4+2", "random(8+4+2)", "vote(8+4+2)" or (their mean) a sequence.

    Raises:
        UsageError: a precision that cannot be read or is not possible.
    """
    if isinstance(value, InferenceMode):
        return value
    aggregation: Aggregation = "mean"
    if isinstance(value, (tuple, list)) and value and all(isinstance(part, Precision) for part in value):
        parts: Sequence[PrecisionLike] = cast("Sequence[Precision]", value)
    elif isinstance(value, str):
        call = _CALL.fullmatch(value.strip())
        if call:
            aggregation = cast("Aggregation", call[1])
        # Inside parentheses a comma is as good as a plus.
        parts = re.split(r"[+,]", call[2]) if call else value.split("+")
    else:
        parts = [cast("PrecisionLike", value)]
    precisions = tuple(sorted(parse_precisions(parts), reverse=True))
    return InferenceMode(precisions, aggregation if len(precisions) > 1 else "mean")


def parse_modes(text: str) -> tuple[InferenceMode, ...]:
    """Reads several with commas between them, as "8,4,random(8+4)"; repeats are dropped.

    Raises:
        UsageError: one that cannot be read or is not possible.
    """
    return tuple(dict.fromkeys(map(parse_mode, _COMMA.split(text))))


def mode_name(value: InferenceMode | Sequence[Precision]) -> str:
    """How it is written, in files and tables: `4`, `w4a8`, `8+4+2`, `random(8+4+2)`; `parse_mode` reads it."""
    return str(parse_mode(value))


def check_differentiable(mode: InferenceMode) -> None:
    """Refuses what an attack cannot follow the gradient of.

    Raises:
        UsageError: it is a vote.
    """
    if mode.aggregation == "vote":
        mean = InferenceMode(mode.precisions)
        raise UsageError(f"{mode} has no gradient to follow: attack the mean instead, {mean}, which breaks votes too")


def sorted_modes(names: Iterable[str]) -> list[str]:
    """Names: single precisions from many bits to few, then means, random draws and votes."""
    found = {name: parse_mode(name) for name in names}
    return sorted(
        found,
        key=lambda name: (found[name].is_single, _ORDER.index(found[name].aggregation), found[name].precisions),
        reverse=True,
    )


def logits_at(
    model: nn.Module, mode: InferenceMode | Sequence[Precision], *, draws: torch.Generator | None = None
) -> Callable[[Tensor], Tensor]:
    """A model as it is run, whatever precision is in force outside.

    Gradients flow to the images, but not through a vote.

    Args:
        model: a switchable model in eval mode; put it in `frozen_weights` first.
        mode: the precision, or those that are run together.
        draws: where random precisions come from; None for torch's own stream.

    Returns:
        Images (N, 3, H, W) in [0, 1] to logits (N, classes); of a vote, to numbers of votes, where more bits weigh a
        little more, which decides ties.

    Raises:
        UsageError: the model does not have one of the precisions.
    """
    mode = parse_mode(mode)
    wanted = precisions_or_all(model, mode.precisions)

    def at(precision: Precision, images: Tensor) -> Tensor:
        with at_precision(model, precision):
            return model(images)

    def mean(images: Tensor) -> Tensor:
        outputs = [at(precision, images) for precision in wanted]
        return outputs[0] if len(outputs) == 1 else sum(outputs[1:], outputs[0]) / len(outputs)

    def drawn(images: Tensor) -> Tensor:
        chosen = torch.randint(len(wanted), (len(images),), generator=draws).to(images.device)
        places = [(chosen == number).nonzero().squeeze(1) for number in range(len(wanted))]
        parts = [at(precision, images[place]) for precision, place in zip(wanted, places, strict=True) if len(place)]
        return torch.cat(parts)[torch.cat(places).argsort()]

    def votes(images: Tensor) -> Tensor:
        outputs = [at(precision, images) for precision in wanted]
        ballots = [one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits.dtype) for logits in outputs]
        # The fractions are less than a vote all together: they decide between equal numbers only.
        weighted = [(1 + 0.5 ** (rank + 1)) * ballot for rank, ballot in enumerate(ballots)]
        return sum(weighted[1:], weighted[0])

    return {"mean": mean, "random": drawn, "vote": votes}[mode.aggregation]
