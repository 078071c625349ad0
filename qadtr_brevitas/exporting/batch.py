"""How many images the input of an exported file takes at once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.exporting.formats import Format

Batch: TypeAlias = int | Literal["dynamic"]
"""A number of images, or "dynamic" for any number."""

# Tracing with one image could take a dimension of 1 for a fixed one.
_TRACED = 2


def parse_batch(text: str) -> Batch:
    """Read "dynamic" or a positive number.

    Raises:
        UsageError: it is neither.
    """
    if text == "dynamic":
        return "dynamic"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise UsageError(f"--batch is {text!r}: give a number of images, such as 16, or dynamic for any number")


def check_batch(batch: Batch, form: Format) -> None:
    """Refuse a batch that a format has no room for.

    Raises:
        UsageError: the format takes one image, or a fixed number.
    """
    if batch == 1:
        return
    if form.compiler is not None:
        raise UsageError(
            f"--batch {batch}: {form.compiler.name} makes hardware through which images stream one by one, and its "
            "driver takes any number of them, so the file takes one: leave out --batch"
        )
    if batch == "dynamic" and form.write_dynamic is None:
        raise UsageError(
            f"--batch dynamic: the tools that read {form.name} need to know every size: give a number, or choose a "
            "format of onnxruntime (-f qcdq)"
        )


def as_traced(images: Tensor, batch: Batch) -> Tensor:
    """Return as many images as a file is traced with, (n, C, H, W), repeated where there are fewer."""
    wanted = _TRACED if batch == "dynamic" else batch
    return images.repeat(-(-wanted // len(images)), 1, 1, 1)[:wanted]


def write(form: Format, frozen: nn.Module, images: Tensor, batch: Batch, path: Path) -> None:
    """Write a network in a format, for a batch that `check_batch` allows."""
    if batch == "dynamic":
        assert form.write_dynamic is not None
        form.write_dynamic(frozen, as_traced(images, batch), path)
    else:
        form.write(frozen, as_traced(images, batch), path)
