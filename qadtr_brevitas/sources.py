"""What an attack sees of a switchable model: its logits at one precision, or their mean over several (EOT)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

from qadtr_brevitas.precision import Precision, PrecisionLike, parse_precisions

if TYPE_CHECKING:
    from torch import Tensor, nn

Access: TypeAlias = tuple[Precision, ...]
"""The precisions an attack averages over, from many bits to few; usually one."""


def parse_access(value: PrecisionLike | Sequence[Precision]) -> Access:
    """Reads one precision, or several as "8+4+2" or a sequence of precisions.

    Raises:
        UsageError: a precision that cannot be read or is not possible.
    """
    if isinstance(value, (tuple, list)) and value and all(isinstance(part, Precision) for part in value):
        parts: Sequence[PrecisionLike] = cast("Sequence[Precision]", value)
    else:
        parts = value.split("+") if isinstance(value, str) else [cast("PrecisionLike", value)]
    return tuple(sorted(parse_precisions(parts), reverse=True))


def access_name(precisions: Sequence[Precision]) -> str:
    """How precisions are written, in files and tables: `4`, `w4a8`, `8+4+2`; `parse_access` reads it."""
    return "+".join(map(str, parse_access(precisions)))


def sorted_accesses(names: Iterable[str]) -> list[str]:
    """Names of precisions and of means over them: from many bits to few, the means last."""
    found = {name: parse_access(name) for name in names}
    return sorted(found, key=lambda name: (len(found[name]) == 1, found[name]), reverse=True)


def logits_at(model: nn.Module, precisions: Sequence[Precision]) -> Callable[[Tensor], Tensor]:
    """A model as an attack sees it, whatever precision is in force outside.

    Several precisions give the mean of their logits: the expectation over a precision that the defender draws at
    random (EOT). Gradients flow to the images.

    Args:
        model: a switchable model in eval mode; put it in `frozen_weights` first.
        precisions: at least one.

    Returns:
        Images (N, 3, H, W) in [0, 1] to logits (N, classes).

    Raises:
        UsageError: the model does not have one of the precisions.
    """
    from qadtr_brevitas.quant import at_precision, precisions_or_all

    wanted = precisions_or_all(model, precisions)

    def logits(images: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for precision in wanted:
            with at_precision(model, precision):
                outputs.append(model(images))
        return outputs[0] if len(outputs) == 1 else sum(outputs[1:], outputs[0]) / len(outputs)

    return logits
