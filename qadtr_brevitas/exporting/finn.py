"""The format for FINN: QONNX that takes bytes, with a build configuration."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qadtr_brevitas.core.files import write_json
from qadtr_brevitas.exporting.compiler import CLOCK_NS, BuildTarget, Compiler
from qadtr_brevitas.exporting.formats import Classifier, Format
from qadtr_brevitas.exporting.graph import library, nodes_of
from qadtr_brevitas.exporting.onnx_files import load_qonnx, writer_for
from qadtr_brevitas.exporting.rewrite import PIXELS, new_node, new_tensor, reconnect

_LIBRARY = "finn.builder.custom_step_library."
# The second one is there for the thresholds of pixels, which it cuts to what a byte can be.
_PLAIN = ("step_streamline", f"{_LIBRARY}mobilenet.step_mobilenet_lower_convs", "step_convert_to_hw")
_RESIDUAL = (
    f"{_LIBRARY}resnet.step_resnet_tidy",
    f"{_LIBRARY}resnet.step_resnet_streamline",
    "step_convert_to_hw",
    f"{_LIBRARY}resnet.step_resnet_convert_to_hw",
)
_SPECIALIZE = "specialize_layers.json"
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


class Finn(Compiler):
    """AMD's FINN (finn-plus), which builds dataflow accelerators of threshold and matrix units."""

    name = "finn"
    package = "finn-plus"
    variable = "QADTR_BREVITAS_FINN"
    script = "finn_build.py"
    rounds_ties_up = True
    estimates = True
    options = ("board", "fps")
    # finn-plus 1.6.1, finn.util.basic.part_map.
    boards = (
        *("Pynq-Z1", "Pynq-Z2", "Ultra96", "Ultra96-V2", "ZCU102", "ZCU104", "ZCU111", "RFSoC2x2", "RFSoC4x2"),
        *("KV260_SOM", "AUP-ZU3_8GB", "U50", "U200", "U250", "U280", "U55C", "VEK280", "VCK190", "V80"),
    )

    def adapt(self, model: Any) -> None:
        """Take pixels as bytes, 0 to 255."""
        given = model.graph.input[0].name
        scaled = new_tensor(model, model.get_tensor_shape(given))
        for reader in model.find_consumers(given):
            reconnect(reader, given, scaled)
        largest = new_tensor(model, [], np.array(PIXELS))
        model.graph.node.append(new_node("Div", [given, largest], scaled))
        model.set_tensor_datatype(given, library("qonnx.core.datatype").DataType["UINT8"])

    def write_build_files(self, folder: Path, model_file: Path, build: BuildTarget) -> None:
        text = "".join(_config(build, residual=_has_sums(model_file)))
        (folder / "dataflow_build_config.yaml").write_text(text)
        write_json(folder / _SPECIALIZE, {"Defaults": {"preferred_impl_style": ["hls", ["MVAU", "VVAU"]]}})
        (folder / "README.md").write_text(_README)


def _has_sums(path: Path) -> bool:
    """Return whether two activations are added anywhere: FINN has other steps for residual networks."""
    model: Any = library("qonnx.core.modelwrapper").ModelWrapper(str(path))
    return any(
        model.get_initializer(node.input[0]) is None and model.get_initializer(node.input[1]) is None
        for node in nodes_of(model, "Add")
    )


def _config(build: BuildTarget, *, residual: bool) -> Iterable[str]:
    yield f"board: {build.board}\n"
    yield "shell_flow_type: vivado_zynq           # vitis_alveo for an Alveo card\n"
    yield f"synth_clk_period_ns: {CLOCK_NS}\n"
    yield f"target_fps: {build.fps}                        # or folding_config_file: folding_config.json\n"
    yield "standalone_thresholds: true\n"
    # FINN has no estimate of the look-up tables of those in RTL: it counts 0.
    yield f"specialize_layers_config_file: {_SPECIALIZE}   # matrix units by high-level synthesis, not RTL\n"
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


_README = """\
# A network for FINN

`model.onnx` is QONNX. It takes one image of raw bytes, (1, 3, height, width) from 0 to 255 (FINN's accelerator takes it
with channels last), and gives logits; the normalization of pixels is part of it.

Build it in this folder, where FINN is installed (made for and tried with finn-plus 1.6.1):

    finn build dataflow_build_config.yaml model.onnx

`input.npy` and `expected_output.npy` are what the build verifies itself with. `target_fps` is where folding starts:
FINN chooses how many multipliers each layer gets; `report/auto_folding_config.json` of a build is a start of your own.
`specialize_layers.json` has matrix units made by high-level synthesis, whose look-up tables FINN can estimate; without
it FINN takes units in RTL from 4 bit on, which put more into multipliers (DSP) and of whose tables it has no estimate.
`export-report.json` says what was compared with PyTorch, and what rounding ties up, as FINN does, changes.
"""


def _load(path: Path) -> Classifier:
    """Load a file that takes bytes, which arithmetic in floats holds exactly."""
    classify = load_qonnx(path)
    return lambda images: classify((images * PIXELS).round())


_COMPILER = Finn()
FINN = Format(
    name=_COMPILER.name,
    help="a folder to build with FINN",
    max_bits=8,
    write=writer_for(_COMPILER),
    load=_load,
    takes_bytes=True,
    target="finn",
    compiler=_COMPILER,
)
