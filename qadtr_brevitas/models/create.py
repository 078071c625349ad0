"""Float networks by timm's names, with errors that say what to type next."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import timm
from torch import nn

from qadtr_brevitas.errors import CheckpointError, UsageError


def create_float_model(
    name: str, *, num_classes: int, pretrained: bool = False, args: Mapping[str, Any] | None = None
) -> nn.Module:
    """Makes a float network with `timm.create_model`, to which the name goes untouched.

    Args:
        name: any timm name: `cifar_resnet20`, `resnet50.a1_in1k`, `hf-hub:owner/name`, `local-dir:/path`.
        num_classes: outputs.
        pretrained: load the weights that timm knows for the name.
        args: further arguments of `timm.create_model`.

    Raises:
        UsageError: the name is unknown (the nearest ones are offered), or timm refuses it or an argument.
        CheckpointError: weights or configuration cannot be fetched.
    """
    check_model_name(name)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **(args or {}))
    except OSError as error:
        raise CheckpointError(
            f"cannot fetch {name}: {error}; check the path or the network, or give a file as model.checkpoint"
        ) from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"timm cannot make the model {name!r} ({error}): check model.name and model.args") from error


def check_model_name(name: str) -> None:
    """Refuses a plain name that timm does not know; names with a source (`hf-hub:...`) are left to timm.

    Raises:
        UsageError: the name is unknown.
    """
    architecture = name.partition(".")[0]
    if "/" in name or ":" in name or timm.is_model(architecture):
        return
    near = get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "see qadtr-brevitas list models"
    raise UsageError(f"unknown model {name!r}: {hint}")


def fixed_size_args(name: str, image_size: tuple[int, int]) -> dict[str, Any]:
    """The argument that tells a network made for one image size (most transformers) about another one.

    Args:
        name: a timm name.
        image_size: height and width in pixels.
    """
    config = None if ":" in name else timm.get_pretrained_cfg(name.partition(".")[0])
    return {"img_size": image_size} if config is not None and config.fixed_input_size else {}
