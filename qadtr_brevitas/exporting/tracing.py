"""What PyTorch's exporter to ONNX cannot trace: pools, which others stand for, and the rest, as one clear error.

`avg_pool2d` loses `divisor_override`. `adaptive_avg_pool2d` is refused where the size of its output is no factor of
that of its input, as in a VGG on small images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qadtr_brevitas.core.errors import ExportError, QadtrError

_DIVISOR = "divisor_override"


class KnownPools(TorchFunctionMode):
    """While active, computes the pools that the exporter does not know by others; their results are the same."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        divisor = kwargs.get(_DIVISOR, args[6] if len(args) > 6 else None)
        if name == "avg_pool2d" and divisor is not None:
            return _divided_pool(func, divisor, *args[:6], **{k: v for k, v in kwargs.items() if k != _DIVISOR})
        if name == "adaptive_avg_pool2d" and _is_uneven(*args, **kwargs):
            return _adaptive_pool(*args, **kwargs)
        return func(*args, **kwargs)


def _divided_pool(
    func: Callable[..., Tensor],
    divisor: int,
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    # With a divisor of its own, what is padded never counts.
    average = func(input, kernel_size, stride, padding, ceil_mode, True)
    return average * (prod(_pair(kernel_size)) / divisor)


def _pair(size: Any) -> tuple[Any, Any]:
    return (size, size) if isinstance(size, int) else tuple(size) * (3 - len(size))


def _sides(x: Tensor, output_size: Any) -> list[tuple[int, int]]:
    """Return an adaptive pool's sides, before and after; None in `output_size` keeps that of the input."""
    sides = (int(side) for side in x.shape[-2:])
    return [(side, side if size is None else int(size)) for side, size in zip(sides, _pair(output_size), strict=True)]


def _is_uneven(input: Tensor, output_size: Any) -> bool:  # PyTorch's own name
    return any(side % size for side, size in _sides(input, output_size))


def _adaptive_pool(input: Tensor, output_size: Any) -> Tensor:
    """Compute the mean over each window: over rows first, then over columns."""
    (rows, height), (columns, width) = _sides(input, output_size)
    if not height % rows and not width % columns:
        # No window holds more than one pixel.
        return F.interpolate(input, (height, width), mode="nearest")
    return _averaged(_averaged(input, height, -2), width, -1)


def _averaged(x: Tensor, count: int, dim: int) -> Tensor:
    side = int(x.shape[dim])
    windows = [(index * side // count, -(-(index + 1) * side // count)) for index in range(count)]
    return torch.cat([x.narrow(dim, low, high - low).mean(dim, keepdim=True) for low, high in windows], dim)


@contextmanager
def exporter_errors() -> Generator[None]:
    """Turn whatever an exporter raises into one line, with the layer where the exporter names it.

    Raises:
        ExportError: something else than an error for users or of the disk was raised inside.
    """
    try:
        yield
    except (QadtrError, OSError, MemoryError):
        raise
    except Exception as error:
        # PyTorch prints the names of all modules around a node, as in "scope: Net::/VGG::net/Pool::net.avgpool".
        scope = re.search(r"scope: (\S+)", str(error))
        layer = scope[1].rpartition("::")[2].removeprefix("net.") if scope else ""
        first = next(iter(str(error).strip().splitlines()), "")
        raise ExportError(
            f"{layer or 'a layer'} cannot be written as ONNX: {type(error).__name__}: {first.partition('  [')[0]}"
        ) from error
