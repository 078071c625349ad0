"""What layers put out, by their names."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.quant import SwitchableModel

_FIRST = 3
_SHOWN = 12
_INSIDE = ("brevitas.", "qadtr_brevitas.quant.")


def choose_layers(model: nn.Module, names: Sequence[str], *, of: str) -> dict[str, nn.Module]:
    """Layers of a switchable model by name; its first three convolutions where no names are given.

    Args:
        model: a switchable model.
        names: as in the float network.
        of: name of the model, for errors.

    Raises:
        UsageError: there is no layer of a name (the nearest ones are offered), or no convolution to choose.
    """
    modules = _layers(model.net if isinstance(model, SwitchableModel) else model)
    if not names:
        found = {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)}
        if not found:
            raise UsageError(f"{of} has no convolutions: choose layers=[...] from {_some(modules)}")
        return dict(list(found.items())[:_FIRST])
    for name in names:
        if name not in modules:
            near = get_close_matches(name, modules, n=1)
            raise UsageError(
                f"{of} has no layer {name!r}: "
                + (f"did you mean {near[0]!r}?" if near else f"choose from {_some(modules)}")
            )
    return {name: modules[name] for name in names}


def _layers(net: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The layers of a network by name; what is inside of quantizers and norms is none of them."""
    found: dict[str, nn.Module] = {}
    for name, child in net.named_children():
        found[prefix + name] = child
        if not type(child).__module__.startswith(_INSIDE) or any(
            isinstance(part, (nn.Conv2d, nn.Linear)) for part in child.modules() if part is not child
        ):
            found |= _layers(child, f"{prefix}{name}.")
    return found


def _some(names: Iterable[str]) -> str:
    """The first names, because networks have hundreds."""
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


@contextmanager
def recorded(layers: dict[str, nn.Module]) -> Generator[dict[str, Tensor]]:
    """A block in which the latest output of each layer is in the dictionary.

    Raises:
        UsageError: a layer's output is no feature map (N, C, h, w).
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UsageError(
                f"layer {name!r} puts out {shape}, not a map (N, C, h, w): choose another one, such as a convolution"
            )
        found[name] = output.detach()

    handles = [
        layer.register_forward_hook(lambda module, inputs, output, name=name: keep(name, output))
        for name, layer in layers.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def covered_cells(covered: Tensor, size: tuple[int, int]) -> Tensor:
    """Which cells of a map a patch touches, boolean (N, 1, h, w).

    Args:
        covered: boolean (N, 1, H, W), pixels of the images.
        size: (h, w) of the map, at most (H, W).
    """
    return F.adaptive_max_pool2d(covered.float(), size) > 0


def change_at(change: Tensor, clean: Tensor, region: Tensor) -> Tensor:
    """Mean size of the change in a region as a share of the clean map's mean size, (N,).

    Args:
        change: (N, C, h, w), patched minus clean.
        clean: (N, C, h, w).
        region: boolean (N, 1, h, w); NaN where it is empty.
    """
    inside = (change.abs().mean(dim=1, keepdim=True) * region).flatten(1).sum(dim=1) / region.flatten(1).sum(dim=1)
    size = clean.abs().flatten(1).mean(dim=1)
    return torch.where(size > 0, inside / size, torch.nan)
