"""Whether the compiler that a network was converted for can take it, told before it is calibrated or trained."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.core.registry import FORMATS
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.exporting.formats import Format
from qadtr_brevitas.exporting.onnx_files import check_traced
from qadtr_brevitas.quant import SwitchableModel, allowed_precisions, freeze


def check_for_target(model: SwitchableModel, target: str | None) -> bool:
    """Refuse a network that the compiler of its target cannot take.

    Args:
        model: the converted network, calibrated or not.
        target: registered name of what it was converted for; None for nothing.

    Returns:
        Whether there was anything to check, and the libraries of exports to do so.

    Raises:
        ExportError: what is in the way, with the layers that it concerns.
    """
    forms: list[Format] = [FORMATS.load(name) for name in FORMATS.names()]
    form = next((form for form in forms if form.compiler is not None and form.target == target), None)
    precision = _smallest(model)
    if form is None or form.compiler is None or precision is None or not all(map(find_spec, form.packages)):
        return False
    image = torch.rand(1, len(model.mean.flatten()), *model.image_size, generator=generator(0, "export"))
    check_traced(form.compiler, freeze(model, precision).cpu().eval(), image)
    return True


def _smallest(model: SwitchableModel) -> Precision | None:
    allowed = allowed_precisions(model)
    quantized = [precision for precision in allowed if FLOAT_BITS not in (precision.weight, precision.act)]
    # A mixed precision may leave layers in float, and the others are exported all the same.
    return min(quantized, key=lambda precision: (precision.is_mixed, precision.act, precision.weight), default=None)
