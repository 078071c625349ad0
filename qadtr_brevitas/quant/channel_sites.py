"""Places where a channel can be scaled without changing what the network computes: made by one layer, read by others.

A convolution, linear layer or norm makes the channels; ReLUs, pools and dropout, which scale with their input, may be
between; only convolutions and linear layers read them. Factors that are powers of two change no digit of any float, so
the network computes the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from qadtr_brevitas.quant.layers import SwitchableConv2d, SwitchableLayer, SwitchableReLU, SwitchableReLU6
from qadtr_brevitas.quant.norm import SwitchableBatchNorm
from qadtr_brevitas.quant.products import products_not_intercepted
from qadtr_brevitas.quant.switch import observing

# Modules whose output scales with their input, channel by channel.
_SCALING = (nn.ReLU, nn.Identity, nn.Dropout, nn.Dropout2d, DropPath, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_NORMS = (SwitchableBatchNorm, nn.LayerNorm, nn.GroupNorm)
Maker = SwitchableLayer | SwitchableBatchNorm | nn.LayerNorm | nn.GroupNorm


@dataclass
class Site:
    """Channels that one module makes and some layers read.

    Args:
        maker: a convolution, linear layer or norm with an affine, whose outputs they are.
        readers: the layers.
    """

    maker: Maker
    readers: list[SwitchableLayer] = field(default_factory=list[SwitchableLayer])

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.maker.weight.shape[0]

    @torch.no_grad()
    def scale(self, exponents: Tensor) -> None:
        """Multiply channels by 2^exponent where they are made, and divide them where they are read, in place.

        Args:
            exponents: whole numbers, (channels,).
        """
        scale_outputs(self.maker, exponents)
        for reader in self.readers:
            scale_inputs(reader, -exponents)


@torch.no_grad()
def scale_outputs(maker: Maker, exponents: Tensor) -> None:
    """Multiply the outputs of a layer or norm by 2^exponent, (out,), in place."""
    for parameter in (maker.weight, maker.bias):
        if parameter is not None:
            parameter.copy_(torch.ldexp(parameter, exponents.view(-1, *(1,) * (parameter.dim() - 1))))


@torch.no_grad()
def scale_inputs(reader: SwitchableLayer, exponents: Tensor) -> None:
    """Multiply the weights that read each input channel by 2^exponent, (in,), in place."""
    weight = reader.weight
    groups = reader.groups if isinstance(reader, SwitchableConv2d) else 1
    by_group = weight.unflatten(0, (groups, -1))
    factors = exponents.view(groups, 1, -1, *(1,) * (weight.dim() - 2))
    weight.copy_(torch.ldexp(by_group, factors).flatten(0, 1))


@torch.no_grad()
def find_sites(model: nn.Module, images: Tensor) -> list[Site]:
    """Return the places of a network whose channels can be scaled, in the order in which a forward pass reaches them.

    Each is tried on images: where other functions read the channels too, the logits change, and it is left out.

    Args:
        model: a switchable model.
        images: a few images, (N, C, H, W) in [0, 1], on the model's device.
    """
    with observing(model, lambda quantizer, tensor: None):
        found = _followed(model, images)
        expected: Tensor = model(images)
        if _computes_same(model, images, expected, found):
            return found
        return [site for site in found if _computes_same(model, images, expected, [site])]


def _computes_same(model: nn.Module, images: Tensor, expected: Tensor, sites: Sequence[Site]) -> bool:
    """Return whether scaled channels leave the logits as they are; the weights are restored."""
    # No two neighbors alike, so that channels that are mixed or exchanged are noticed.
    exponents = [torch.arange(site.channels, device=images.device) % 3 - 1 for site in sites]
    for site, each in zip(sites, exponents, strict=True):
        site.scale(each)
    same = torch.equal(model(images), expected)
    for site, each in zip(sites, exponents, strict=True):
        site.scale(-each)
    return same


def _followed(model: nn.Module, images: Tensor) -> list[Site]:
    """Return the sites that modules show which return or read the very tensor of another module."""
    sites: dict[Maker, Site] = {}
    # Each tensor is kept, so that no other one gets its id.
    made: dict[int, tuple[Tensor, Maker]] = {}
    calls: dict[nn.Module, int] = {}

    def leave(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        maker = module if _is_maker(module) else made[id(args[0])][1] if id(args[0]) in made else None
        scales = _is_maker(module) or (isinstance(module, _SCALING) or _is_relu(module))
        if maker is not None and scales:
            made[id(y)] = y, maker  # pyright: ignore[reportArgumentType]

    def enter(reader: SwitchableLayer, args: tuple[Tensor, ...]) -> None:
        if id(args[0]) not in made:
            return
        maker = made[id(args[0])][1]
        sites.setdefault(maker, Site(maker)).readers.append(reader)

    layers = [module for module in model.modules() if isinstance(module, SwitchableLayer)]
    followed = [m for m in model.modules() if _is_maker(m) or isinstance(m, _SCALING) or _is_relu(m)]
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [module.register_forward_hook(leave) for module in followed]
    try:
        with products_not_intercepted():
            model(images)
    finally:
        for handle in handles:
            handle.remove()

    def once(site: Site) -> bool:
        return all(calls.get(module) == 1 for module in (site.maker, *site.readers))

    return [site for site in sites.values() if once(site) and all(_reads(site, reader) for reader in site.readers)]


def _is_relu(module: nn.Module) -> bool:
    return isinstance(module, SwitchableReLU) and not isinstance(module, SwitchableReLU6)


def _is_maker(module: nn.Module) -> bool:
    if isinstance(module, SwitchableLayer):
        return True
    act = getattr(module, "act", None)
    weight = module.weight if isinstance(module, _NORMS) else None
    is_norm = isinstance(weight, Tensor) and weight.dim() == 1
    return is_norm and (act is None or isinstance(act, _SCALING) or _is_relu(act))


def _reads(site: Site, reader: SwitchableLayer) -> bool:
    groups = reader.groups if isinstance(reader, SwitchableConv2d) else 1
    return reader.weight.shape[1] * groups == site.channels
