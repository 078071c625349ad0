"""Targets: the compilers and runtimes that networks are converted for, with their requirements as data."""

from __future__ import annotations

from dataclasses import dataclass

from qadtr_brevitas.core.registry import TARGETS


@dataclass(frozen=True, kw_only=True)
class Target:
    """The requirements of a compiler on the places and kinds of quantizers.

    Every target computes with integers: it supports neither float layers nor ranges that are measured at run time, and
    sums of activations are quantized.

    Args:
        name: the registered name.
        quantizer: registered name of the quantizer of weights and activations; those derived from it are allowed too.
        linear_per_channel: whether linear layers may have a weight threshold per output channel.
        products: names of the functions that multiply and accumulate which it can compute; None for all.
        quantizes_once: whether the two sides of a sum may have different steps. Then each tensor is quantized once for
            all that read it at its bit-width; otherwise one signed quantizer quantizes both sides of a sum again.
    """

    name: str
    quantizer: str = "uniform"
    linear_per_channel: bool = True
    products: frozenset[str] | None = frozenset({"conv2d", "linear"})
    quantizes_once: bool = False


FINN = Target(name="finn")
# In fixed point only steps that are powers of two are exact. Scales per channel are refused in linear layers.
HLS4ML = Target(name="hls4ml", quantizer="power-of-two", linear_per_channel=False)
# onnxruntime computes layers in integers whose result is quantized, and sums of quantized values.
ORT = Target(name="ort", products=None, quantizes_once=True)


def find_target(name: str | None) -> Target | None:
    """Return the target of a registered name; None for None.

    Raises:
        UsageError: the name is unknown (the nearest right one is offered).
    """
    return None if name is None else TARGETS.load(name)
