"""Float networks by name: of timm, of torchvision, or of a function in any Python package."""

from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import filter as matching
from typing import Any

import timm
from torch import nn

from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.models.python_functions import create_from_function, function_config, is_function_name
from qadtr_brevitas.models.torchvision_models import (
    create_torchvision_model,
    torchvision_config,
    torchvision_names,
    torchvision_size_args,
)


def create_float_model(
    name: str, *, num_classes: int, pretrained: bool = False, args: Mapping[str, Any] | None = None
) -> nn.Module:
    """Make a float network by its name.

    Args:
        name: a name that is passed to `timm.create_model` as it is (`cifar_resnet20`, `resnet50.a1_in1k`,
            `hf-hub:owner/name`, `local-dir:/path`); a network of torchvision that timm lacks, such as `alexnet`; or
            `package.module:function`, a function or class that returns a network. Its module is imported, which runs
            its code.
        num_classes: number of outputs.
        pretrained: whether to load the weights that timm or torchvision publishes under the name.
        args: further keyword arguments of `timm.create_model`, of torchvision's builder or of the function.

    Raises:
        UsageError: the name is unknown (the nearest ones are offered), an argument is not accepted, or a function has
            no published weights.
        CheckpointError: weights or configuration cannot be fetched.
    """
    check_model_name(name)
    if is_function_name(name):
        if pretrained:
            raise UsageError(f"there are no published weights of {name}: give a file as model.checkpoint")
        return create_from_function(name, num_classes=num_classes, args=args)
    try:
        if name in torchvision_names():
            return create_torchvision_model(name, num_classes=num_classes, pretrained=pretrained, args=args)
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **(args or {}))
    except OSError as error:
        raise CheckpointError(
            f"cannot fetch {name}: {error}; check the path or the network, or give a file as model.checkpoint"
        ) from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise _creation_error(name, error) from error


def model_names(pattern: str = "*") -> dict[str, str]:
    """Return the names that match a shell pattern, each with its library; those of this package are among timm's."""
    return {
        **dict.fromkeys(timm.list_models(pattern), "timm"),
        **dict.fromkeys(matching(torchvision_names(), pattern), "torchvision"),
    }


def is_model_name(name: str) -> bool:
    """Return whether timm or torchvision has a network of this name, with any pretrained tag."""
    return timm.is_model(name.partition(".")[0]) or name in torchvision_names()


def check_model_name(name: str) -> None:
    """Raise if neither timm nor torchvision has the name; names with a colon (`hf-hub:...`) are not checked.

    Raises:
        UsageError: the name is unknown.
    """
    if ":" in name or is_model_name(name):
        return
    if "/" in name or "\\" in name:
        raise UsageError(
            f"there is no folder {name}, and no model of that name: give the folder of a model or run, a name of timm, "
            f"hf-hub:{name} for the Hugging Face Hub, or local-dir:{name} for a folder that timm wrote"
        )
    near = get_close_matches(name.partition(".")[0], [*timm.list_models(), *torchvision_names()], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "see qadtr-brevitas list models"
    raise UsageError(f"unknown model {name!r}: {hint}")


def model_config(name: str) -> Mapping[str, Any]:
    """Return timm's `pretrained_cfg` of a name (`input_size`, `crop_pct`, `fixed_input_size`, ...), as far as known.

    Raises:
        UsageError: the name is unknown.
        CheckpointError: the configuration of an `hf-hub:` or `local-dir:` name cannot be fetched.
    """
    check_model_name(name)
    if name in torchvision_names():
        return torchvision_config(name)
    if is_function_name(name):
        return function_config(name)
    if ":" in name:
        # Only the network itself has the configuration of such a name.
        return create_float_model(name, num_classes=2).pretrained_cfg  # pyright: ignore[reportReturnType]
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise _creation_error(name, error) from error
    return {} if config is None else config.to_dict()


def own_image_size(name: str, args: Mapping[str, Any]) -> tuple[int, float]:
    """Return the height in pixels and timm's `crop_pct` of the images that a network is made for.

    Args:
        name: as in `create_float_model`.
        args: further arguments, which may set another size.

    Raises:
        UsageError: the name is unknown, or the network of a function does not record its image size.
        CheckpointError: as in `model_config`.
    """
    config = model_config(name)
    size = next((args[key] for key in ("img_size", "image_size", "input_size") if key in args), None)
    if size is None and is_function_name(name) and "input_size" not in config:
        raise UsageError(
            f"{name} does not say what size of images it takes: set data.dataset.image_size=N, or give the network the "
            "attribute pretrained_cfg = {'input_size': (3, N, N)}"
        )
    size = config.get("input_size", (3, 224, 224))[-2:] if size is None else size
    return size if isinstance(size, int) else size[0], config.get("crop_pct", 1.0)


def fixed_size_args(name: str, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return the argument that sets the image size of a network with a fixed one (most transformers), or none.

    Args:
        name: as in `create_float_model`.
        image_size: height and width in pixels.

    Raises:
        UsageError, CheckpointError: as in `model_config`.
    """
    if name in torchvision_names():
        return torchvision_size_args(name, image_size)
    return {"img_size": image_size} if model_config(name).get("fixed_input_size") else {}


def _creation_error(name: str, error: Exception) -> UsageError:
    library = "torchvision" if name in torchvision_names() else "timm"
    return UsageError(f"{library} cannot make the model {name!r} ({error}): check model.name and model.args")
