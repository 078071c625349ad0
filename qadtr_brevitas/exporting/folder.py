"""What a compiler wants beside the model: an image with its expected output, a build configuration, instructions."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.files import write_json
from qadtr_brevitas.exporting.formats import MODEL_FILE, Format
from qadtr_brevitas.exporting.graph import library, nodes_of
from qadtr_brevitas.exporting.rewrite import PIXELS

CLOCK_NS = 10.0
HLS4ML_SCRIPT = Path(__file__).parent / "compilers" / "hls4ml_build.py"
_LIBRARY = "finn.builder.custom_step_library."
# The second one is there for the thresholds of pixels, which it cuts to what a byte can be.
_PLAIN = ("step_streamline", f"{_LIBRARY}mobilenet.step_mobilenet_lower_convs", "step_convert_to_hw")
_RESIDUAL = (
    f"{_LIBRARY}resnet.step_resnet_tidy",
    f"{_LIBRARY}resnet.step_resnet_streamline",
    "step_convert_to_hw",
    f"{_LIBRARY}resnet.step_resnet_convert_to_hw",
)
_BEFORE = ("step_qonnx_to_finn", "step_tidy_up")
_AFTER = (
    "step_minimize_bit_width_initial",
    "step_create_dataflow_partition",
    "step_specialize_layers",
    "step_target_fps_parallelization",
    "step_apply_folding_config",
    "step_minimize_bit_width",
    "step_generate_estimate_reports",
)


@dataclass(frozen=True, kw_only=True)
class Build:
    """What to build for.

    Args:
        board: one that FINN knows.
        fps: images per second to start folding from (FINN).
        part: FPGA part (hls4ml).
    """

    board: str = "Pynq-Z1"
    fps: int = 100
    part: str = "xc7z020clg400-1"


def write_build_files(folder: Path, form: Format, frozen: nn.Module, image: Tensor, build: Build) -> None:
    """Adds to a folder with the model file what its compiler needs.

    Args:
        folder: holds the model file.
        form: a format of a compiler.
        frozen: the network.
        image: (1, 3, H, W) in [0, 1], in steps of 1/255.
        build: what to build for.
    """
    with torch.no_grad():
        np.save(folder / "expected_output.npy", frozen(image).numpy())
    pixels = (image * PIXELS).round() if form.takes_bytes else image
    np.save(folder / "input.npy", pixels.numpy())
    if form.compiler == "finn":
        text = "".join(_finn_config(build, residual=_has_sums(folder / MODEL_FILE)))
        (folder / "dataflow_build_config.yaml").write_text(text)
        (folder / "README.md").write_text(_FINN_README)
    else:
        settings = {
            "backend": "Vitis",
            "io_type": "io_stream",
            # Narrower ones round BatchNorm's factors until activations flip.
            "default_precision": "fixed<48,16>",
            "part": build.part,
            "clock_period_ns": CLOCK_NS,
        }
        write_json(folder / "hls4ml_config.json", settings)
        shutil.copy(HLS4ML_SCRIPT, folder / "build.py")
        (folder / "README.md").write_text(_HLS4ML_README)


def _has_sums(path: Path) -> bool:
    """Whether two activations are added anywhere: FINN has other steps for residual networks."""
    model: Any = library("qonnx.core.modelwrapper").ModelWrapper(str(path))
    return any(
        model.get_initializer(node.input[0]) is None and model.get_initializer(node.input[1]) is None
        for node in nodes_of(model, "Add")
    )


def _finn_config(build: Build, *, residual: bool) -> Iterable[str]:
    yield f"board: {build.board}\n"
    yield "shell_flow_type: vivado_zynq           # vitis_alveo for an Alveo card\n"
    yield f"synth_clk_period_ns: {CLOCK_NS}\n"
    yield f"target_fps: {build.fps}                        # or folding_config_file: folding_config.json\n"
    yield "standalone_thresholds: true\n"
    yield "output_dir: build_output\n"
    yield "generate_outputs: [estimate_reports]   # with Vivado also bitfile, pynq_driver, deployment_package\n"
    yield "verify_steps: [finn_onnx_python, initial_python]\n"
    yield "verify_input_npy: input.npy\n"
    yield "verify_expected_output_npy: expected_output.npy\n"
    yield "# With Vivado add: step_hw_codegen, step_generate_hardware, step_synthesize_bitfile, step_make_driver,\n"
    yield "# step_deployment_package\n"
    yield "steps:\n"
    for step in (*_BEFORE, *(_RESIDUAL if residual else _PLAIN), *_AFTER):
        yield f"  - {step}\n"


_FINN_README = """\
# A network for FINN

`model.onnx` is QONNX. It takes one image of raw bytes, (1, 3, height, width) from 0 to 255 (FINN's accelerator takes it
with channels last), and gives logits; the normalization of pixels is part of it.

Build it in this folder, where FINN is installed (made for and tried with finn-plus 1.6.1):

    finn build dataflow_build_config.yaml model.onnx

`input.npy` and `expected_output.npy` are what the build verifies itself with. `target_fps` is where folding starts:
FINN chooses how many multipliers each layer gets; `report/auto_folding_config.json` of a build is a start of your own.
`export-report.json` says what was compared with PyTorch, and what rounding ties up, as FINN does, changes.
"""
_HLS4ML_README = """\
# A network for hls4ml

`model.onnx` is QONNX, with steps that are powers of two. It takes one image, (1, 3, height, width) from 0 to 1 (with
channels last in the hardware), and gives logits; the normalization of pixels is part of it.

Where hls4ml 1.3, qonnx 1.0 and g++ are installed,

    python build.py --output project

makes a project, emulates it bit by bit on `input.npy`, and compares with `expected_output.npy`. Settings are those of
`hls4ml_config.json`. With Vitis HLS installed, `project/build_prj.tcl` synthesizes it.
"""
