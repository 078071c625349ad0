"""A universal patch: texture, shape, placement rule and the facts of how it was made. Saved without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qadtr_brevitas.attacks.drawing import as_rgba
from qadtr_brevitas.attacks.fake_quantize import PATCH_FILE_BITS, fake_quantize
from qadtr_brevitas.attacks.geometry import Box, Place, paste, place_corners
from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.core.files import write_atomically
from qadtr_brevitas.core.version import __version__

FORMAT = "qadtr_brevitas.patch"
FORMAT_VERSION = 1
_TENSORS = ("texture", "mask")
_PICTURE_SIDE = 256
# Devices round the last bit of a quotient in different ways.
_OFF_GRID = 1e-6


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A universal patch.

    Args:
        texture: (C, h, w) in [0, 1], of as many channels as the images, on the grid of 8-bit images, so that what is
            saved is what was scored.
        mask: boolean (h, w), True where the patch covers the image. Never derived from the texture.
        place: `random`, or (row, column) of the top left pixel.
        keep_out: (row, column, height, width) of a box that random places leave free, for instance the main object's.
        meta: how it was made, JSON values only. The attack fills `attack`, `settings`, `target`, `seed`,
            `threat_model` (such as "universal targeted") and `versions`; the caller, who knows the model under attack,
            adds `model`, `fingerprint` and `precision` with `with_meta`.

    Raises:
        UsageError: the shapes of texture and mask do not match, or the texture is off the grid.
    """

    texture: Tensor
    mask: Tensor
    place: Place = "random"
    keep_out: Box | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.texture.ndim != 3 or len(self.texture) == 0 or self.texture.shape[1:] != self.mask.shape:
            raise UsageError(
                f"texture {tuple(self.texture.shape)} and mask {tuple(self.mask.shape)} do not match: "
                "give (channels, h, w) and (h, w)"
            )
        if not _is_on_grid(self.texture):
            raise UsageError("the texture is not on the grid of 8-bit images in [0, 1]: give fake_quantize(texture, 8)")

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) in pixels."""
        return self.mask.shape[0], self.mask.shape[1]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.texture.shape[0]

    @property
    def pixels(self) -> int:
        """Number of pixels it covers."""
        return int(self.mask.sum())

    def to(self, device: torch.device | str) -> Patch:
        """Return the same patch on another device."""
        return replace(self, texture=self.texture.to(device), mask=self.mask.to(device))

    def with_meta(self, **facts: Any) -> Patch:
        """Return the same patch with further facts in its meta."""
        return replace(self, meta={**self.meta, **facts})

    def apply(
        self, images: Tensor, *, corners: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Paste the patch into images (N, C, H, W) in [0, 1]; pixels outside the mask stay the same floats.

        Args:
            images: on the patch's device.
            corners: (N, 2) row and column per image; None follows the patch's own placement rule.
            generator: draws random places; needed if `place` is random and no corners are given.

        Raises:
            UsageError: the patch does not fit on the image or has another number of channels, or its place is random
                and there is no generator.
        """
        self.check_channels(images.shape[1])
        if corners is None:
            image_size = images.shape[-2], images.shape[-1]
            corners = place_corners(
                self.place, len(images), image_size, self.size, generator=generator, keep_out=self.keep_out
            )
        return paste(images, self.texture, self.mask, corners)

    def check_channels(self, channels: int) -> None:
        """Check that images have as many channels as the patch.

        Raises:
            UsageError: they have not.
        """
        if channels != self.channels:
            raise UsageError(
                f"the patch has {self.channels} channels and the images have {channels}: give a patch that was made on "
                "such images"
            )

    def save(self, path: str | Path) -> Path:
        """Write NAME.safetensors and a picture, NAME.png, and return the path of the first.

        Raises:
            CheckpointError: the files cannot be written.
        """
        target = _with_suffix(Path(path))
        tensors = {
            "texture": (self.texture * 255).round().to(torch.uint8).cpu().contiguous(),
            "mask": self.mask.to(torch.uint8).cpu().contiguous(),
        }
        header = {
            "format": FORMAT,
            "version": str(FORMAT_VERSION),
            "place": json.dumps(self.place),
            "keep_out": json.dumps(self.keep_out),
            "meta": json.dumps(dict(self.meta)),
        }
        write_atomically(target, lambda temporary: save_file(tensors, temporary, metadata=header))
        write_atomically(target.with_suffix(".png"), self._draw)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read what `save` wrote, bit for bit.

        Raises:
            CheckpointError: there is no such file, it is not a patch file, it is damaged, or its version is newer.
        """
        source = _with_suffix(Path(path))
        header, tensors = _read(source)
        try:
            place = json.loads(header["place"])
            # Files of the first release have no such key.
            keep_out = json.loads(header.get("keep_out", "null"))
            return cls(
                texture=tensors["texture"].float() / 255,
                mask=tensors["mask"].bool(),
                place=place if place == "random" else (int(place[0]), int(place[1])),
                keep_out=keep_out and _box(*keep_out),
                meta=json.loads(header["meta"]),
            )
        except (LookupError, ValueError, TypeError, UsageError) as error:
            raise CheckpointError(f"{source} is damaged ({error}): make the patch again") from error

    def _draw(self, path: Path) -> None:
        """Draw the patch enlarged without smoothing; pixels outside the mask are transparent."""
        pixels = as_rgba(self.texture, self.mask).mul(255).round().to(torch.uint8).cpu()
        scale = max(1, _PICTURE_SIDE // max(self.size))
        enlarged = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0).contiguous()
        Image.fromarray(enlarged.numpy(), "RGBA").save(path, format="PNG")


def versions() -> dict[str, str]:
    """Return the releases a patch is made with, for its meta."""
    return {"qadtr_brevitas": __version__, **{name: version(name) for name in ("torch", "brevitas")}}


def _is_on_grid(texture: Tensor) -> bool:
    return bool(((texture - fake_quantize(texture, PATCH_FILE_BITS)).abs() <= _OFF_GRID).all())


def _with_suffix(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def _box(row: int, column: int, height: int, width: int) -> Box:
    return int(row), int(column), int(height), int(width)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_format(path, header)
            return header, {name: file.get_tensor(name) for name in _TENSORS}
    except FileNotFoundError:
        raise CheckpointError(f"there is no patch file {path}: make one with `qadtr-brevitas attack`") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}): make the patch again") from error


def _check_format(path: Path, header: Mapping[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a patch file: give one that `qadtr-brevitas attack` wrote")
    version = header.get("version", "")
    if not version.isdecimal() or int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has patch format {version!r}, this release reads up to {FORMAT_VERSION}: upgrade qadtr_brevitas"
        )
