"""Inference modes of a switchable model: one precision, or an aggregate of several.

A single precision is written `4`. An aggregate is one of

- `8+4+2`: the mean of the logits, which an attack on all of them maximizes (EOT);
- `random(8+4+2)`: one precision drawn for each image, the random precision inference (RPI) of DWQ (Fu et al. 2021);
- `vote(8+4+2)`: a majority vote, the ensemble of EMPIR (Sen et al. 2020).
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
"""The mean of the logits, one precision drawn for each image, or the class that most precisions predict."""

_ORDER: tuple[Aggregation, ...] = ("vote", "random", "mean")
_CALL = re.compile(r"(random|vote)\((.*)\)", flags=re.DOTALL)
# Commas that are not inside parentheses.
_COMMA = re.compile(r",(?![^(]*\))")


@dataclass(frozen=True)
class InferenceMode:
    """One precision, or several that are run together.

    Args:
        precisions: in descending order of bit-widths; usually one.
        aggregation: how several are combined.
    """

    precisions: tuple[Precision, ...]
    aggregation: Aggregation = "mean"

    @property
    def is_single(self) -> bool:
        """Whether there is one precision, and nothing to combine."""
        return len(self.precisions) == 1

    @property
    def is_random(self) -> bool:
        """Whether the logits of the same images may differ from call to call."""
        return self.aggregation == "random" and not self.is_single

    def __str__(self) -> str:
        names = "+".join(map(str, self.precisions))
        return names if self.aggregation == "mean" or self.is_single else f"{self.aggregation}({names})"


def parse_mode(value: PrecisionLike | InferenceMode | Sequence[Precision]) -> InferenceMode:
    """Read an inference mode: one precision, "8+4+2", "random(8+4+2)", "vote(8+4+2)", or a sequence for its mean.

    Raises:
        UsageError: a precision cannot be read or is not possible.
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
        # Inside parentheses a comma means the same as a plus.
        parts = re.split(r"[+,]", call[2]) if call else value.split("+")
    else:
        parts = [cast("PrecisionLike", value)]
    precisions = tuple(sorted(parse_precisions(parts), reverse=True))
    return InferenceMode(precisions, aggregation if len(precisions) > 1 else "mean")


def parse_modes(text: str) -> tuple[InferenceMode, ...]:
    """Read inference modes separated by commas, as "8,4,random(8+4)"; repeats are dropped.

    Raises:
        UsageError: a precision cannot be read or is not possible.
    """
    return tuple(dict.fromkeys(map(parse_mode, _COMMA.split(text))))


def mode_name(value: InferenceMode | Sequence[Precision]) -> str:
    """Return the name of a mode as files and tables have it: `4`, `w4a8`, `8+4+2`, `random(8+4+2)`."""
    return str(parse_mode(value))


def check_differentiable(mode: InferenceMode) -> None:
    """Raise if a mode has no gradient for an attack to follow.

    Raises:
        UsageError: the mode is a vote.
    """
    if mode.aggregation == "vote":
        mean = InferenceMode(mode.precisions)
        raise UsageError(f"{mode} has no gradient to follow: attack the mean instead, {mean}, which breaks votes too")


def sorted_modes(names: Iterable[str]) -> list[str]:
    """Sort names of modes: single precisions from many bits to few, then means, random draws and votes."""
    found = {name: parse_mode(name) for name in names}
    return sorted(
        found,
        key=lambda name: (found[name].is_single, _ORDER.index(found[name].aggregation), found[name].precisions),
        reverse=True,
    )


def logits_at(
    model: nn.Module, mode: InferenceMode | Sequence[Precision], *, draws: torch.Generator | None = None
) -> Callable[[Tensor], Tensor]:
    """Return a function that runs a model in an inference mode, whatever its current precision.

    Gradients flow to the images, except through a vote.

    Args:
        model: a switchable model in eval mode; put it in `frozen_weights` first.
        mode: the inference mode.
        draws: generator of random precisions; None for torch's default one.

    Returns:
        A function from images (N, 3, H, W) in [0, 1] to logits (N, classes). A vote returns numbers of votes, in which
        more bits weigh a little more, so that ties are decided.

    Raises:
        UsageError: the model lacks one of the precisions.
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
        # The fractions add up to less than one vote, so they only decide ties.
        weighted = [(1 + 0.5 ** (rank + 1)) * ballot for rank, ballot in enumerate(ballots)]
        return sum(weighted[1:], weighted[0])

    return {"mean": mean, "random": drawn, "vote": votes}[mode.aggregation]
