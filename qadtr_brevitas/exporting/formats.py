"""The contract of export formats, and what keeps a network from being written in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.core.registry import FORMATS
from qadtr_brevitas.exporting.compiler import Compiler
from qadtr_brevitas.exporting.integers import IntegerLayers
from qadtr_brevitas.pipeline.directories import ONNX_FILE
from qadtr_brevitas.quant.feature_clip import feature_clips
from qadtr_brevitas.quant.switchable_quant import SwitchableDynamicQuant, SwitchableQuant

Classifier: TypeAlias = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) in [0, 1] to logits (N, classes)."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write a network.

    Args:
        name: the registered name.
        help: what it is for, in one line.
        max_bits: the most bits a weight or activation may have.
        write: writes the frozen model, traced on images (N, C, H, W), to a file that takes N images at once.
        write_dynamic: writes it likewise so that the file takes any number of images; None for formats of fixed sizes.
        load: returns what a file computes.
        takes_bytes: the file takes pixels as bytes, so images are rounded to these before anything is compared.
        target: registered name of the target that networks are best converted for; None if that does not matter.
        compiler: the FPGA compiler that it is for, whose files are written beside the model; None for none.
        exact: the file computes what the network computes, but for the order of additions.
        remedy: what to do where a file computes something else, a sentence.
        runtimes: what runs the file, for people who are handed it.
        caution: what they have to know besides, a sentence.
        count_integers: tells which layers of a file are computed in integers; None for formats that need no telling.
        packages: optional packages that writing and loading need.
        file: name of the file in the folder.
    """

    name: str
    help: str
    max_bits: int
    write: Callable[[nn.Module, Tensor, Path], None]
    load: Callable[[Path], Classifier]
    write_dynamic: Callable[[nn.Module, Tensor, Path], None] | None = None
    takes_bytes: bool = False
    target: str | None = None
    compiler: Compiler | None = None
    exact: bool = True
    remedy: str = ""
    runtimes: str = "the tool it is for"
    caution: str = ""
    count_integers: Callable[[Path], IntegerLayers] | None = None
    packages: tuple[str, ...] = ("onnx", "qonnx")
    file: str = ONNX_FILE


def find_format(name: str) -> Format:
    """Return the format of a registered name.

    Raises:
        UsageError: the name is unknown (the nearest right one is offered).
    """
    return FORMATS.load(name)


def check_bits(precision: Precision, form: Format) -> None:
    """Refuses a precision with floats.

    Raises:
        UsageError: weights or activations are not quantized.
    """
    if FLOAT_BITS in (precision.weight, precision.act):
        raise UsageError(f"{form.name} holds integers, and at {precision} there are floats: choose fewer bits")


def blockers(model: nn.Module, form: Format) -> list[str]:
    """Return what is in the way, in words; nothing where the format can hold the network.

    Args:
        model: a switchable model, at the precision to export.
        form: the format.
    """
    return [*_too_many_bits(model, form), *_dynamic(model, form), *_feature_clips(model, form)]


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


def _feature_clips(model: nn.Module, form: Format) -> Iterator[str]:
    names = ", ".join(clip.name for clip in feature_clips(model))
    if names and form.compiler is not None:
        yield (
            f"it clips the norms of features after {names}, and {form.name} computes with integers: convert it without "
            "feature_clip, or export to qcdq, qonnx or ort"
        )
