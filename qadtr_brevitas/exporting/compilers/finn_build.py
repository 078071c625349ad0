"""Runs FINN's conversion and estimates on an exported folder; needs finn-plus, and no Vivado.

    python finn_build.py FOLDER RESULT.json [--no-execute]

The steps are those of the folder's dataflow_build_config.yaml. The graph is executed on input.npy before the steps,
after streamlining and as hardware layers, and compared with expected_output.npy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import types
from collections import Counter
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

_EXECUTED = ("step_tidy_up", "step_streamline", "step_resnet_streamline", "step_convert_to_hw")
_RESOURCES = ("LUT", "BRAM_18K", "URAM", "DSP")


def main() -> None:
    """Read the arguments, build in a folder of its own, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--no-execute", action="store_true", help="do not execute the graph between steps")
    given = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="finn-"))
    try:
        result = _build(given.folder.resolve(), scratch, execute=not given.no_execute)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    given.result.write_text(json.dumps(result, indent=2))


def _prepare(scratch: Path) -> None:
    os.environ |= {"FINN_BUILD_DIR": str(scratch), "FINN_SETTINGS": str(scratch / "settings.yaml")}
    os.environ.setdefault("NUM_DEFAULT_WORKERS", "1")
    # FINN imports torch for one layer that is not used here, and scipy looks at it once it is there.
    modules: list[Any] = [types.ModuleType(name) for name in ("torch", "torch.nn", "torch.nn.functional")]
    torch, nn, functional = modules
    torch.Tensor, torch.nn, nn.functional = type("Tensor", (), {}), nn, functional
    for module in modules:
        sys.modules.setdefault(module.__name__, module)
    # It also refuses to be imported without Vivado's simulator, which estimates do not need.
    xsi: Any = import_module("finn.xsi")
    for name in xsi._LAZY_NAMES:
        setattr(xsi, name, type(name, (), {}))
    xsi.ensure_available = lambda: True


def _build(folder: Path, scratch: Path, *, execute: bool) -> dict[str, Any]:
    _prepare(scratch)
    build, config = import_module("finn.builder.build_dataflow"), import_module("finn.builder.build_dataflow_config")
    os.chdir(folder)
    settings = config.DataflowBuildConfig.construct_from(Path("dataflow_build_config.yaml"))
    settings.output_dir = str(scratch / "output")
    model = import_module("qonnx.core.modelwrapper").ModelWrapper("model.onnx")
    differences: dict[str, float] = {}
    kinds: Counter[str] = Counter()
    for name, step in zip(settings.steps, build.resolve_build_steps(settings), strict=True):
        model = step(model, settings)
        short = name.rpartition(".")[2]
        if execute and short in _EXECUTED:
            differences[short] = _difference(model)
        if short == "step_create_dataflow_partition":
            kinds = Counter(node.op_type for node in model.graph.node)
        print(short, dict(Counter(node.op_type for node in model.graph.node)), file=sys.stderr, flush=True)
    report = scratch / "output" / "report"
    found = {
        "version": version("finn-plus"),
        "differences": differences,
        "largest": _largest(),
        "hardware_layers": dict(kinds),
    }
    return {**found, "board": settings.board, "available": _available(settings.board), **_estimates(report)}


def _largest() -> float:
    return float(abs(import_module("numpy").load("expected_output.npy")).max())


def _available(board: str) -> dict[str, int]:
    """Return the resources of a board; nothing for one that FINN does not tell them of."""
    platform = import_module("finn.util.platforms").platforms.get(board)
    if platform is None:
        return {}
    # Look-up tables, flip-flops, 18-kbit block RAMs, UltraRAMs and multipliers of each die.
    lut, _, bram, uram, dsp = (sum(counts) for counts in zip(*platform().compute_resources, strict=True))
    return {"lut": int(lut), "bram_18k": int(bram), "uram": int(uram), "dsp": int(dsp)}


def _difference(model: Any) -> float:
    """Return the largest difference of an output from the expected one."""
    numpy, executor = import_module("numpy"), import_module("qonnx.core.onnx_exec")
    images, expected = numpy.load("input.npy"), numpy.load("expected_output.npy")
    given, wanted = model.graph.input[0].name, model.graph.output[0].name
    output = executor.execute_onnx(model, {given: images.astype(numpy.float32)})[wanted]
    return float(abs(output.reshape(expected.shape) - expected).max())


def _estimates(report: Path) -> dict[str, Any]:
    def read(name: str) -> dict[str, Any]:
        return json.loads((report / name).read_text())

    cycles, resources = read("estimate_layer_cycles.json"), read("estimate_layer_resources.json")
    layers = [
        {
            "name": name,
            **{key.lower(): resources.get(name, {}).get(key, 0) for key in _RESOURCES},
            "cycles": cycles.get(name, 0),
        }
        for name in dict.fromkeys([*cycles, *resources])
        if name != "total"
    ]
    performance = read("estimate_network_performance.json")
    return {
        "layers": layers,
        "fps": performance["estimated_throughput_fps"],
        "latency_ns": performance["estimated_latency_ns"],
        "folding": read("auto_folding_config.json"),
    }


if __name__ == "__main__":
    main()
