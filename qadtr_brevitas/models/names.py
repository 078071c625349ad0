"""Names of tensors in checkpoints: prefixes of wrappers, and what is stored beside the weights of a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qadtr_brevitas.core.errors import CheckpointError

# Mean and standard deviation of a layer that normalizes images.
_STATISTICS = (("mu", "sigma"), ("mean", "std"), ("mean", "sigma"), ("image_mean", "image_std"))
# What training scripts store beside the network: losses, metrics, other networks.
_BESIDE = ("criterion", "loss", "loss_fn", "metric", "metrics", "optimizer", "teacher", "train_acc", "val_acc", "ema")


def without_prefix(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by the names of a network, if all of these are found behind one prefix.

    Args:
        weights: by the names of a checkpoint.
        own: the state dict of the network.

    Returns:
        The weights of the network by its names, and all others by theirs, but for those of losses, metrics and other
        networks; all as they are if no prefix fits.

    Raises:
        CheckpointError: several prefixes fit, so there are several such networks in the file.
    """
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    if not needed or all(name in weights for name in needed):
        return dict(weights)
    ends = [name.removesuffix(needed[0]) for name in weights if name.endswith("." + needed[0])]
    fitting = [prefix for prefix in ends if all(prefix + name in weights for name in needed)]
    if len(fitting) > 1 and any(prefix.partition(".")[0] not in _BESIDE for prefix in fitting):
        fitting = [prefix for prefix in fitting if prefix.partition(".")[0] not in _BESIDE]
    if len(fitting) > 1:
        raise CheckpointError(
            f"the file holds several networks that fit, under {' and '.join(fitting)}: save the state_dict() of one"
        )
    if not fitting:
        return dict(weights)
    (prefix,) = fitting
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    others = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    return {**{name: value for name, value in others.items() if name.partition(".")[0] not in _BESIDE}, **found}


def without_normalization(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return weights without the mean and standard deviation of images, and these as `mean` and `std`, or None.

    Args:
        weights: by name.
        own: the state dict of the network; what it has itself stays.
    """
    for mean, std in _STATISTICS:
        for name, value in weights.items():
            parent, dot, last = name.rpartition(".")
            other = f"{parent}{dot}{std}"
            if last == mean and other in weights and name not in own and value.numel() == weights[other].numel() <= 16:
                rest = {key: value for key, value in weights.items() if key not in (name, other)}
                found = {"mean": value, "std": weights[other]}
                return rest, {key: tuple(value.flatten().tolist()) for key, value in found.items()}
    return dict(weights), None
