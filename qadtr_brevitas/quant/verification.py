"""Checks of a fresh conversion: it computes what the float network computes, and each image by itself."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant.switch import observing
from qadtr_brevitas.quant.switchable_quant import SwitchableDynamicQuant, SwitchableQuant

# Kernels may add up in another order in another batch, but not much more.
_SAME = 1e-3


def check_same_function(model: nn.Module, pixels: Tensor, logits: Tensor, replaced: Mapping[nn.Module, str]) -> None:
    """Run a converted model in float and raise if it is not the network that it was made of.

    Args:
        model: the switchable model, in any mode.
        pixels: the images that the float network ran on, in [0, 1].
        logits: what it returned.
        replaced: the modules that were replaced, and, of a copied network, those of the original; with their names.

    Raises:
        UsageError: one of them runs, since something else than the module tree holds it; or the logits differ.
    """
    with _watched(replaced) as ran, observing(model, _ignore):
        found = model(pixels)
        if ran:
            raise UsageError(
                f"{ran[0]} also runs by a way that a conversion cannot change (a list or function that holds the "
                "module): keep modules as attributes or in nn.ModuleList, and call them from there"
            )
        if _differs(found, logits) and not _differs(found, model(pixels)):
            off = float((found - logits).abs().max() / logits.abs().max())
            raise UsageError(
                f"{type(model).__name__} computes something else at 32 bit than the float network (by {off:.1%}): a "
                "module that works in place, and whose result is not used, has to be replaced by one that returns it"
            )


def check_images_apart(model: nn.Module, pixels: Tensor) -> None:
    """Raise if a dynamic quantizer measures a range over several images.

    Args:
        model: the switchable model, in any mode.
        pixels: three images or more in [0, 1], which differ.

    Raises:
        UsageError: the range that a quantizer measures for an image depends on the other images.
    """
    together = _ranges(model, pixels)
    for index in (0, len(pixels) - 1):
        for name, alone in _ranges(model, pixels[index : index + 1]).items():
            own = [scales[min(index, len(scales) - 1)] for scales in together.get(name, [])]
            expected = [scales[0] for scales in alone]
            if len(own) != len(expected) or any(map(_differs, own, expected)):
                raise UsageError(
                    f"{name} gets a tensor whose first dimension is not the images, one after the other: dynamic "
                    "quantizers could not measure a range for each; use activations='static'"
                )


def _ranges(model: nn.Module, pixels: Tensor) -> dict[str, list[Tensor]]:
    """Return the steps of the images, (images,), in each call of each dynamic quantizer."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, SwitchableDynamicQuant)}
    found: dict[str, list[Tensor]] = {}

    def observe(quantizer: SwitchableQuant, x: Tensor) -> None:
        if isinstance(quantizer, SwitchableDynamicQuant):
            bits = max(8, quantizer.min_bits)
            # The functions called here are not part of a module that quantizes its own products.
            with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
                found.setdefault(names[quantizer], []).append(quantizer.image_scales(x, bits))

    with observing(model, observe):
        model(pixels)
    return found


@contextmanager
def _watched(modules: Mapping[nn.Module, str]) -> Generator[list[str]]:
    """Collect the names of the modules that run."""
    ran: list[str] = []

    def note(module: nn.Module, _: Any) -> None:
        ran.append(modules[module])

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _ignore(quantizer: SwitchableQuant, x: Tensor) -> None:
    pass


def _differs(one: Tensor, other: Tensor) -> bool:
    atol = _SAME * float(other.detach().abs().nan_to_num(0).max())
    return not torch.allclose(one, other, rtol=_SAME, atol=atol, equal_nan=True)
