"""Equalization of channels before calibration, by powers of two (Nagel et al. 2019; Xiao et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.quant.channel_sites import Maker, Site, find_sites, scale_inputs, scale_outputs
from qadtr_brevitas.quant.layers import SwitchableConv2d, SwitchableLayer, switchable_layers
from qadtr_brevitas.quant.model import SwitchableModel
from qadtr_brevitas.quant.norm import norms
from qadtr_brevitas.quant.ptq import PtqMethod, PtqRun, PtqState
from qadtr_brevitas.quant.switch import observing

# Channels differ by 2^16 at most afterwards from what they were; those that are nearly dead would ask for more.
_LARGEST = 8


class ChannelExponents(PtqState):
    """The powers of two by which a model's input and output channels were scaled.

    Scaling back is exact as well, so `reset` restores the weights of the float network bit for bit.

    Args:
        method: the method that chooses them.
        makers: modules whose outputs may be scaled, by name.
        readers: layers whose inputs may be scaled, by name.
    """

    def __init__(self, method: PtqMethod, makers: dict[str, Maker], readers: dict[str, SwitchableLayer]) -> None:
        super().__init__(method)
        # Plain dictionaries: these modules belong to the network.
        self._outputs = {_key(name, "outputs"): maker for name, maker in makers.items()}
        self._inputs = {_key(name, "inputs"): reader for name, reader in readers.items()}
        for key, maker in self._outputs.items():
            self._add(key, len(maker.weight), maker.weight)
        for key, reader in self._inputs.items():
            groups = reader.groups if isinstance(reader, SwitchableConv2d) else 1
            self._add(key, reader.weight.shape[1] * groups, reader.weight)

    def _add(self, key: str, channels: int, like: Tensor) -> None:
        self.register_buffer(key, torch.zeros(channels, dtype=torch.int8, device=like.device))

    def scale(self, site: Site, exponents: Tensor) -> None:
        """Scale the channels of a site by 2^exponent, (channels,), and note it."""
        site.scale(exponents)
        for key, maker in self._outputs.items():
            if maker is site.maker:
                self.get_buffer(key).add_(exponents.to(torch.int8))
        for key, reader in self._inputs.items():
            if any(reader is each for each in site.readers):
                self.get_buffer(key).sub_(exponents.to(torch.int8))

    def reset(self) -> None:
        for key, maker in self._outputs.items():
            if (found := self.get_buffer(key)).any():
                scale_outputs(maker, -found.int())
        for key, reader in self._inputs.items():
            if (found := self.get_buffer(key)).any():
                scale_inputs(reader, -found.int())
        for found in self.buffers():
            found.zero_()


@plugin
class Equalize(PtqMethod):
    """Give channels similar ranges: where they are large, divide them by a power of two that the next layer multiplies.

    It works on the output of a convolution, linear layer or norm that only convolutions and linear layers read, through
    ReLUs (not ReLU6) and pools. It runs before the ranges are set, wherever it stands in the list, and changes the
    float weights of all precisions at once. Powers of two change no digit of a float, so that 32 bit computes what it
    did, bit for bit, and a later calibration without it restores the weights.

    Sources: cross-layer equalization (Nagel et al. 2019, https://arxiv.org/abs/1906.04721), SmoothQuant (Xiao et al.
    2023, https://arxiv.org/abs/2211.10438) and, at `alpha` 1, the powers of two of FQ-ViT (Lin et al. 2022,
    https://arxiv.org/abs/2111.13824).
    """

    alpha: Annotated[
        float,
        Field(ge=0, le=1, description="1 makes the ranges of activations alike, 0 those of the weights that read them"),
    ] = 0.5

    def prepare(self, model: nn.Module) -> None:
        switchable = _switchable(model)
        if not any(isinstance(state, ChannelExponents) for state in switchable.children()):
            layers = switchable_layers(switchable)
            kinds = (nn.LayerNorm, nn.GroupNorm)
            named = dict(switchable.named_modules())
            makers: dict[str, Maker] = {**layers}
            makers |= {name: m for name, m in named.items() if isinstance(m, kinds) and m.weight is not None}  # pyright: ignore
            held = set(norms(switchable))
            makers |= {name: m for name, m in named.items() if m in held and m.weight is not None}  # pyright: ignore
            switchable.channel_exponents = ChannelExponents(self, makers, layers)

    def start(self, model: nn.Module) -> PtqRun:
        return _Run(self, _switchable(model))


class _Run(PtqRun):
    passes = 1

    def __init__(self, method: Equalize, model: SwitchableModel) -> None:
        self._method = method
        self._model = model

    def rewrite(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
        """Scale the channels, from their largest magnitudes on all images."""
        sites = find_sites(self._model, next(iter(batches))[:2])
        if not sites:
            raise UsageError(
                "equalize finds no channels to scale: no convolution, linear layer or norm of this network has an "
                "output that only convolutions and linear layers read, through ReLUs (ReLU6 and GELU do not scale): "
                "leave it out, and use gptq or bias-correction"
            )
        largest = self._largest(sites, batches, count_batch)
        state = next(each for each in self._model.children() if isinstance(each, ChannelExponents))
        for site in sites:
            state.scale(site, self._exponents(site, largest[site.readers[0]]))

    def improve(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
        """Do nothing: the channels are scaled."""

    def _largest(
        self, sites: list[Site], batches: Iterable[Tensor], count_batch: Callable[[], object]
    ) -> dict[SwitchableLayer, Tensor]:
        """Return the largest magnitude of each channel of the first reader of each site, (channels,)."""
        found: dict[SwitchableLayer, Tensor] = {}

        def note(reader: SwitchableLayer, args: tuple[Tensor, ...]) -> None:
            channel = 1 if isinstance(reader, SwitchableConv2d) else args[0].dim() - 1
            magnitudes = args[0].detach().abs().amax([d for d in range(args[0].dim()) if d != channel])
            found[reader] = torch.maximum(found[reader], magnitudes) if reader in found else magnitudes

        handles = [site.readers[0].register_forward_pre_hook(note) for site in sites]
        try:
            with observing(self._model, lambda quantizer, tensor: None):
                for images in batches:
                    self._model(images)
                    count_batch()
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _exponents(self, site: Site, largest: Tensor) -> Tensor:
        """Return the exponents of a site; channels that are always 0, or that no weight reads, stay as they are."""
        shares = torch.stack([_shares(reader) for reader in site.readers]).amax(0)
        alpha = 1.0 if all(reader.weight.shape[1] == 1 for reader in site.readers) else self._method.alpha
        wanted = (1 - alpha) * shares.log2() - alpha * largest.float().log2()
        known = wanted.isfinite()
        if not known.any():
            return torch.zeros_like(wanted, dtype=torch.int32)
        centered = (wanted - wanted[known].median()).round().clamp(-_LARGEST, _LARGEST)
        return torch.where(known, centered, 0).int()


@torch.no_grad()
def _shares(reader: SwitchableLayer) -> Tensor:
    """Return the largest weight on each input channel, as a share of the largest of the same output channel, (in,)."""
    groups = reader.groups if isinstance(reader, SwitchableConv2d) else 1
    rows = reader.weight.abs().flatten(2) if reader.weight.dim() > 2 else reader.weight.abs()[:, :, None]
    largest = rows.amax(2)
    shares = largest / largest.amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return shares.unflatten(0, (groups, -1)).amax(1).flatten()


def _switchable(model: nn.Module) -> SwitchableModel:
    return next(module for module in model.modules() if isinstance(module, SwitchableModel))


def _key(name: str, side: str) -> str:
    return f"{name.replace('.', '/')}:{side}"
