"""The defense by masks that goes with a file: its masks, the code that answers through them, and what it costs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.evaluation.certification import Certification
from qadtr_brevitas.evaluation.defended_classifier import DefendedClassifier, DefendedPrediction
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.masks import mean_color
from qadtr_brevitas.evaluation.one_round import place_kinds
from qadtr_brevitas.evaluation.tta import VIEWS
from qadtr_brevitas.exporting.formats import Format
from qadtr_brevitas.exporting.rewrite import PIXELS

MASKS_FILE, DEFENSE_FILE = "masks.npz", "defend.py"
_DEPLOYED = Path(__file__).parent / "deployed"


@dataclass(frozen=True, kw_only=True)
class Defense:
    """What predictions through masks cost.

    Args:
        patch: size of the largest patch that they hold under.
        method: the certifier.
        masks: how many there are.
        passes: forward passes of an image on which all masks agree, where nothing is certified.
        passes_to_certify: forward passes of an image that is certified.
        fps: images per second on the FPGA of the estimate, of the first kind; None without an estimate.
        fps_to_certify: of the second kind.
    """

    patch: str
    method: str
    masks: int
    passes: int
    passes_to_certify: int
    fps: float | None
    fps_to_certify: float | None

    def sentences(self) -> Iterator[str]:
        """Say what it does and what it costs."""
        yield (
            f"Masks hide patches of up to {self.patch} pixels ({self.method}): an image on which all {self.masks} "
            f"masks agree takes {self.passes} forward passes, one that is certified {self.passes_to_certify}."
        )
        if self.fps is not None and self.fps_to_certify is not None:
            yield (
                f"By FINN's estimate that is {self.fps:.3g} images per second, and {self.fps_to_certify:.3g} where "
                "each is certified."
            )


def write_defense(
    folder: Path, certification: Certification, loaded: LoadedModel, form: Format, *, fps: float | None
) -> Defense:
    """Write the masks and what answers through them into a folder with a file.

    Args:
        folder: the folder.
        certification: the defense.
        loaded: the network.
        form: the format of the file.
        fps: images per second of the network alone, by an estimate; None without one.

    Raises:
        UsageError: the patch does not fit on the images, or the number of masks does not fit the method.
    """
    size = loaded.info.image_size
    masks = certification.covering(size)
    arrays: dict[str, Any] = {"masks": masks.numpy(), "color": _color(loaded, form).flatten().numpy()}
    if form.takes_bytes:
        arrays["color"] = arrays["color"] * PIXELS
    if certification.fill == "interpolate":
        arrays["levels"] = np.float32(1 if form.takes_bytes else PIXELS)
    if certification.tta != "none":
        arrays["views"] = np.array(VIEWS[certification.tta])
    if certification.overlap > 1:
        arrays["members"] = certification.groups(size).members.numpy()
    if certification.method == "one round":
        arrays["kinds"] = place_kinds(masks, certification.size).numpy()
    np.savez_compressed(folder / MASKS_FILE, **arrays)
    shutil.copy(_DEPLOYED / DEFENSE_FILE, folder / DEFENSE_FILE)
    passes, certified = len(masks) * certification.views, certification.passes_to_prove(size)
    return Defense(
        patch=str(certification.size),
        method=certification.method,
        masks=len(masks),
        passes=passes,
        passes_to_certify=certified,
        fps=None if fps is None else fps / passes,
        fps_to_certify=None if fps is None else fps / certified,
    )


def expected_answers(
    loaded: LoadedModel, precision: Precision, certification: Certification, form: Format, images: Tensor
) -> DefendedPrediction:
    """Return what the network in PyTorch says through the masks.

    Args:
        loaded: the network.
        precision: what it is exported at.
        certification: the defense.
        form: the format, which may take colors as bytes only.
        images: (N, C, H, W) in [0, 1].
    """
    classifier = DefendedClassifier(loaded, precision, certification)
    classifier.loaded.model.color = _color(loaded, form)
    with torch.no_grad():
        return classifier(images)


def _color(loaded: LoadedModel, form: Format) -> Tensor:
    """Return the mean color, (C, 1, 1) in [0, 1], as the file can take it."""
    color = mean_color(loaded.info.mean)
    return (color * PIXELS).round() / PIXELS if form.takes_bytes else color
