"""What keeps a network from being written in a format."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.export.formats import Format
from qadtr_brevitas.precision import FLOAT_BITS, Precision
from qadtr_brevitas.quant.quantizers import SwitchableDynamicQuant, SwitchableQuant


def check_bits(precision: Precision, form: Format) -> None:
    """Refuses a precision with floats.

    Raises:
        UsageError: weights or activations are not quantized.
    """
    if FLOAT_BITS in (precision.weight, precision.act):
        raise UsageError(f"{form.name} holds integers, and at {precision} there are floats: choose fewer bits")


def blockers(model: nn.Module, form: Format) -> list[str]:
    """What is in the way, in words; nothing where the format can hold the network.

    Args:
        model: a switchable model, at the precision to export.
        form: the format.
    """
    return [*_too_many_bits(model, form), *_dynamic(model, form)]


def _too_many_bits(model: nn.Module, form: Format) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, SwitchableQuant) and module.bits > form.max_bits:
            yield f"{name} has {module.bits} bits, more than the {form.max_bits} that {form.name} has room for"
            return


def _dynamic(model: nn.Module, form: Format) -> Iterator[str]:
    if any(isinstance(module, SwitchableDynamicQuant) for module in model.modules()):
        yield (
            f"its activations take their ranges from each image, which {form.name} has no word for: convert it again "
            "without --dynamic"
        )
