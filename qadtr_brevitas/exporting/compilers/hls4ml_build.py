"""Makes an hls4ml project of an exported folder and runs its bit-accurate emulation; needs hls4ml and g++.

    python hls4ml_build.py [FOLDER] [RESULT.json] [--output PROJECT]

Settings are those of the folder's hls4ml_config.json. Images are NHWC there, as in the hardware.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

# hls4ml computes exactly, but for the last bits of fixed<48,16>.
_TOLERANCE = 1e-4


def main() -> None:
    """Read the arguments, convert, compile, and compare with expected_output.npy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    parser.add_argument("result", type=Path, nargs="?")
    parser.add_argument("--output", type=Path, help="keep the project here")
    given = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="hls4ml-"))
    try:
        result = _build(given.folder.resolve(), given.output or scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    text = json.dumps(result, indent=2)
    print(text) if given.result is None else given.result.write_text(text)
    if result["difference"] > _TOLERANCE * result["largest"]:
        sys.exit(f"the emulation differs from expected_output.npy by {result['difference']:g} of {result['largest']:g}")


def _build(folder: Path, output: Path) -> dict[str, Any]:
    numpy, hls4ml = import_module("numpy"), import_module("hls4ml")
    settings = json.loads((folder / "hls4ml_config.json").read_text())
    model = _channels_last(folder / "model.onnx")
    layers = hls4ml.utils.config.config_from_onnx_model(
        model, granularity="name", backend=settings["backend"], default_precision=settings["default_precision"]
    )
    project = hls4ml.converters.convert_from_onnx_model(
        model,
        output_dir=str(output),
        project_name="network",
        io_type=settings["io_type"],
        backend=settings["backend"],
        part=settings["part"],
        clock_period=settings["clock_period_ns"],
        hls_config=layers,
    )
    project.compile()
    images, expected = numpy.load(folder / "input.npy"), numpy.load(folder / "expected_output.npy")
    channels_last = numpy.ascontiguousarray(images.transpose(0, 2, 3, 1))
    found = numpy.asarray(project.predict(channels_last)).reshape(expected.shape)
    return {
        "difference": float(abs(found - expected).max()),
        "largest": float(abs(expected).max()),
        "same_class": float((found.argmax(1) == expected.argmax(1)).mean()),
    }


def _channels_last(path: Path) -> Any:
    cleanup = import_module("qonnx.util.cleanup")
    turn = import_module("qonnx.transformation.channels_last").ConvertToChannelsLastAndClean
    to_matmul = import_module("qonnx.transformation.gemm_to_matmul").GemmToMatMul
    model = cleanup.cleanup_model(import_module("qonnx.core.modelwrapper").ModelWrapper(str(path)))
    model = model.transform(turn(make_input_channels_last=True)).transform(to_matmul())
    return cleanup.cleanup_model(model)


if __name__ == "__main__":
    main()
