"""The images that a network takes: number of channels, size and normalization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any, NamedTuple

from torch import nn

from qadtr_brevitas.core.errors import UsageError

_DEFAULT_SIZE = (3, 224, 224)


class ImageFormat(NamedTuple):
    """The images that a network takes.

    Args:
        size: channels, height and width in pixels.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def image_format(
    net: nn.Module,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: tuple[int, int] | None = None,
    guess: bool = True,
) -> ImageFormat:
    """Return the images that a network takes: as given, or else as it says itself.

    The number of channels is that of the given mean or std, of the first convolution, or of timm's `pretrained_cfg`; 3
    if nothing says so. A mean and std of `pretrained_cfg` for another number of channels is averaged, as timm does.

    Args:
        net: a float network.
        mean: mean per channel of pixels in [0, 1]; None for that of timm's `pretrained_cfg`, or 0.
        std: standard deviation per channel; None for that of timm's `pretrained_cfg`, or 1.
        image_size: height and width in pixels; None for those of timm's `pretrained_cfg`, or 224.
        guess: whether to look at the first convolution, which may read rearranged pixels.

    Raises:
        UsageError: mean and std are not for the same number of channels, or a std is not positive.
    """
    config: Mapping[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    own_channels, *own_size = config.get("input_size") or _DEFAULT_SIZE
    given = mean if mean is not None else std
    channels = own_channels
    if given is not None:
        channels = len(given)
    elif guess:
        channels = _first_channels(net, config, own_channels)
    means = _per_channel(mean, config.get("mean"), 0.0, channels)
    stds = _per_channel(std, config.get("std"), 1.0, channels)
    if not len(means) == len(stds) == channels > 0:
        raise UsageError(
            f"mean has {len(means)} values and std has {len(stds)}: give one of each per channel of images"
        )
    if not all(value > 0 for value in stds):
        raise UsageError(f"std is {stds}: each value must be above 0")
    height, width = image_size or own_size
    return ImageFormat((channels, height, width), means, stds)


def _per_channel(
    given: Sequence[float] | None, own: Sequence[float] | None, default: float, channels: int
) -> tuple[float, ...]:
    if given is not None:
        return tuple(given)
    if not own:
        return (default,) * channels
    return tuple(own) if len(own) == channels else (sum(own) / len(own),) * channels


def _first_channels(net: nn.Module, config: Mapping[str, Any], own: int) -> int:
    """Return the channels that the first convolution reads, as timm names it, or of those the first in the network."""
    named = config.get("first_conv")
    names = [named] if isinstance(named, str) else list(named or ())
    modules = dict(net.named_modules())
    first = next((modules[name] for name in names if name in modules), None)
    convolutions = (module for module in modules.values() if isinstance(module, nn.Conv2d))
    first = first if isinstance(first, nn.Conv2d) else next(convolutions, None)
    if first is None or ("input_size" in config and _is_rearranged(first.in_channels, own)):
        return own
    return first.in_channels


def _is_rearranged(channels: int, own: int) -> bool:
    """Return whether so many channels may be pixels of a square in the place of one pixel (space to depth)."""
    return channels > own and channels % own == 0 and isqrt(channels // own) ** 2 == channels // own
