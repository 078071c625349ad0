"""The compilers that networks are converted for, with what each of them needs as data."""

from __future__ import annotations

from dataclasses import dataclass

from qadtr_brevitas.core.registry import TARGETS


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a compiler needs of the places and kinds of quantizers.

    Every target computes with integers: it has no room for float layers and for ranges that are measured at run time,
    and wants one signed quantizer for both sides of each sum of activations.

    Args:
        name: the registered name.
        quantizer: registered name of the quantizer of weights and activations.
        linear_per_channel: whether linear layers may have a weight threshold per output channel.
        products: functions that multiply and accumulate which it can compute.
    """

    name: str
    quantizer: str = "uniform"
    linear_per_channel: bool = True
    products: frozenset[str] = frozenset({"conv2d", "linear"})


FINN = Target(name="finn")
# It computes in fixed point, in which only steps that are powers of two are exact, and refuses scales per channel in
# linear layers.
HLS4ML = Target(name="hls4ml", quantizer="power-of-two", linear_per_channel=False)


def find_target(name: str | None) -> Target | None:
    """Return the target of a registered name; None for None.

    Raises:
        UsageError: the name is unknown (the nearest right one is offered).
    """
    return None if name is None else TARGETS.load(name)
