"""The files beside the model that its compiler builds with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qadtr_brevitas.exporting.compiler import BuildTarget, Compiler
from qadtr_brevitas.exporting.rewrite import PIXELS
from qadtr_brevitas.pipeline.directories import ONNX_FILE


def write_build_files(
    folder: Path, compiler: Compiler, frozen: nn.Module, image: Tensor, build: BuildTarget, *, takes_bytes: bool
) -> None:
    """Write what a compiler needs into a folder with the model file: an image, its expected output, a configuration.

    Args:
        folder: holds the model file.
        compiler: what the folder is for.
        frozen: the network.
        image: (1, 3, H, W) in [0, 1], in steps of 1/255.
        build: the hardware to build for.
        takes_bytes: whether the file takes pixels as bytes.
    """
    with torch.no_grad():
        np.save(folder / "expected_output.npy", frozen(image).numpy())
    pixels = (image * PIXELS).round() if takes_bytes else image
    np.save(folder / "input.npy", pixels.numpy())
    compiler.write_build_files(folder, folder / ONNX_FILE, build)
