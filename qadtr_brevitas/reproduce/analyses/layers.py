"""The layers of a network by name, and their outputs."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant import SwitchableModel

_DEFAULT_LAYERS = 3
_MAX_LISTED = 12
_QUANTIZER_PACKAGES = ("brevitas.", "qadtr_brevitas.quant.")


def choose_layers(model: nn.Module, names: Sequence[str], *, of: str) -> dict[str, nn.Module]:
    """Return layers of a switchable model by name; without names, its first three convolutions.

    Args:
        model: a switchable model.
        names: names as in the float network.
        of: name of the model, for errors.

    Raises:
        UsageError: there is no layer of a name (the nearest one is offered), or no convolution to choose.
    """
    modules = _named_layers(model.net if isinstance(model, SwitchableModel) else model)
    if not names:
        convolutions = {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)}
        if not convolutions:
            raise UsageError(f"{of} has no convolutions: choose layers=[...] from {_first_names(modules)}")
        return dict(list(convolutions.items())[:_DEFAULT_LAYERS])
    for name in names:
        if name not in modules:
            near = get_close_matches(name, modules, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"choose from {_first_names(modules)}"
            raise UsageError(f"{of} has no layer {name!r}: {advice}")
    return {name: modules[name] for name in names}


@contextmanager
def recorded_outputs(layers: Mapping[str, nn.Module]) -> Generator[dict[str, Tensor]]:
    """Record the latest output of each layer in the dictionary that the block receives.

    Raises:
        UsageError: the output of a layer is not a feature map (N, C, h, w).
    """
    outputs: dict[str, Tensor] = {}

    def record(name: str, output: object) -> None:
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UsageError(
                f"the output of layer {name!r} is {shape}, not a feature map (N, C, h, w): choose another layer, for "
                "instance a convolution"
            )
        outputs[name] = output.detach()

    handles = [
        layer.register_forward_hook(lambda module, inputs, output, name=name: record(name, output))
        for name, layer in layers.items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _named_layers(net: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Return the layers of a network by name, without what is inside quantizers and norms."""
    found: dict[str, nn.Module] = {}
    for name, child in net.named_children():
        found[prefix + name] = child
        if not type(child).__module__.startswith(_QUANTIZER_PACKAGES) or _holds_layers(child):
            found |= _named_layers(child, f"{prefix}{name}.")
    return found


def _holds_layers(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules() if part is not module)


def _first_names(names: Iterable[str]) -> str:
    """Return the first names as text, because networks have hundreds."""
    listed = list(names)
    more = f" and {len(listed) - _MAX_LISTED} more" if len(listed) > _MAX_LISTED else ""
    return ", ".join(listed[:_MAX_LISTED]) + more
