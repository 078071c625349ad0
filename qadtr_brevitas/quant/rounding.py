"""Levels of weights that a PTQ method chose, kept per precision beside the float weights that all precisions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant.ptq import PtqMethod, PtqState
from qadtr_brevitas.quant.switch import Switch


class WeightRounding(PtqState):
    """How many levels above or below the nearest one each weight of a layer is rounded, at each precision below 32.

    The float weights stay as they are. So 32 bit stays the float network, precisions do not touch each other, and
    training goes on from the levels that were found: an offset stays while the weight below it moves.

    A state dict holds each offset in one bit more than the weights have.

    Args:
        method: the method that chooses the levels.
        switch: the model's switch.
        weight: the weight of the layer, (out, in, ...).
        bits: bit-width of the weight at each precision below 32.

    Attributes:
        wanted: the weight that levels are to come near to while a model is calibrated, (out, in, ...), if it is not the
            float weight; None otherwise.
        learned: returns the weight while its levels are learned, (out, in, ...), between levels; None otherwise.
    """

    def __init__(self, method: PtqMethod, switch: Switch, weight: Tensor, bits: Mapping[Precision, int]) -> None:
        super().__init__(method)
        self.switch = switch
        self.bits = {str(precision): of for precision, of in bits.items()}
        self.wanted: Tensor | None = None
        self.learned: Callable[[], Tensor] | None = None
        for name in self.bits:
            self.register_buffer(name, torch.zeros(weight.shape, dtype=torch.int16, device=weight.device))
        # Precisions at which some weight is not rounded to the nearest level: known without reading the offsets.
        self._used: set[str] = set()

    def reset(self) -> None:
        for offset in self.buffers():
            offset.zero_()
        self._used.clear()

    def set(self, precision: Precision, offsets: Tensor) -> None:
        """Keep the offsets in levels at a precision, in the shape of the weight."""
        name = str(precision)
        self.get_buffer(name).copy_(offsets)
        self._note(name)

    def offset(self, precision: Precision) -> Tensor | None:
        """Return the offsets in levels at a precision, in the shape of the weight; None if all are 0."""
        name = str(precision)
        return self.get_buffer(name) if name in self._used else None

    def _note(self, name: str) -> None:
        self._used.discard(name)
        if self.get_buffer(name).any():
            self._used.add(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, bits in self.bits.items():
            destination[prefix + name] = pack(self.get_buffer(name), bits + 1)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        unpacked = dict(state_dict)
        for name, bits in self.bits.items():
            packed, own = state_dict.get(prefix + name), self.get_buffer(name)
            # A tensor of another size is left to the check of shapes.
            if packed is not None and packed.shape == (_packed_size(own.numel(), bits + 1),):
                unpacked[prefix + name] = unpack(packed, bits + 1, own.numel()).view_as(own).to(own.device)
        problems = (missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(unpacked, prefix, local_metadata, strict, *problems)
        for name in self.bits:
            self._note(name)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack signed integers into bytes, the lowest bit first.

    Args:
        values: integers from -2^(bits - 1) to 2^(bits - 1) - 1, of any shape.
        bits: bits of each, at most 16.

    Returns:
        uint8, (ceil(n * bits / 8),) for n values.
    """
    flat = values.detach().flatten().to(torch.int32)
    planes = torch.arange(bits, device=flat.device)
    digits = ((flat[:, None] >> planes) & 1).flatten().to(torch.uint8)
    digits = torch.nn.functional.pad(digits, (0, -len(digits) % 8)).view(-1, 8)
    return (digits << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first signed integers that `pack` packed, int16, (count,)."""
    digits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    digits = digits.flatten()[: count * bits].view(count, bits).to(torch.int32)
    values = (digits << torch.arange(bits, dtype=torch.int32, device=packed.device)).sum(1)
    return (values - ((values >> (bits - 1)) << bits)).to(torch.int16)


def _packed_size(count: int, bits: int) -> int:
    return -(-count * bits // 8)
