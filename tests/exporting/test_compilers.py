"""The compilers themselves on what is exported: FINN to estimates of hardware, hls4ml to its bit-accurate emulation.

They run where `make compilers` has put them. Networks are small; `make judges` builds published ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from torch import nn

from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.core.errors import ExportError, UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.exporting import export, find_format
from qadtr_brevitas.exporting.estimate import Estimate, LayerCost, compiler_python, run_compiler, try_compiler
from qadtr_brevitas.exporting.finn import Finn
from qadtr_brevitas.exporting.hls4ml import Hls4ml
from tests.exporting.networks import Mobile, Ported, loaded, plain

pytestmark = pytest.mark.slow

# What is in hardware, and nothing else: no float between the image's and the logits' end.
_HARDWARE = {
    *("Thresholding", "FMPadding", "ConvolutionInputGenerator", "MVAU", "VVAU", "Pool", "DuplicateStreams", "Shuffle"),
    *("ElementwiseAdd", "ElementwiseMul"),
}


@pytest.fixture(scope="session")
def finn() -> None:
    try:
        compiler_python(Finn())
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def hls4ml() -> None:
    try:
        compiler_python(Hls4ml())
    except UsageError as error:
        pytest.skip(str(error))


def divided(divisor: int) -> nn.Module:
    """The plain network, whose average pool divides by another number than it has pixels."""
    net = plain()
    (pool,) = [name for name, module in net.named_modules() if isinstance(module, nn.AvgPool2d)]
    net.set_submodule(pool, nn.AvgPool2d(2, divisor_override=divisor))
    return net


NETS = {"ported": Ported, "divided": lambda: divided(3), "mobile": lambda: Mobile(blocks=1)}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("finn")
@pytest.mark.parametrize(("name", "bits"), [("ported", 4), ("divided", 2), ("mobile", 2)])
def test_finn_makes_hardware_of_the_whole_network(name: str, bits: int, tmp_path: Path) -> None:
    given = loaded(NETS[name](), target="finn", precisions=(bits,))
    export(given, Precision.parse(bits), find_format("finn"), tmp_path / "out", split=None)
    found = run_compiler(Finn(), tmp_path / "out")
    largest = np.abs(np.load(tmp_path / "out" / "expected_output.npy")).max()
    assert set(found["differences"]) > {"step_tidy_up", "step_convert_to_hw"}
    # No value lies halfway between two levels: integers and floats decide alike.
    assert found["differences"]["step_convert_to_hw"] < 1e-3 * largest
    assert set(found["hardware_layers"]) <= _HARDWARE
    assert found["hardware_layers"]["Thresholding"] > 5
    # In RTL FINN counts no look-up table for these.
    units = [layer for layer in found["layers"] if layer["name"].startswith(("MVAU", "VVAU"))]
    assert len(units) > 2
    assert all(layer["lut"] > 100 for layer in units)
    assert found["available"] == {"lut": 53_200, "bram_18k": 280, "uram": 0, "dsp": 220}
    assert found["fps"] == pytest.approx(1e8 / max(layer["cycles"] for layer in found["layers"]))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("finn")
def test_the_command_shows_costs_of_several_precisions_side_by_side(tmp_path: Path) -> None:
    given = ["--data", "shapes", "model.args={}", "quant.precisions=[32,4,2]", "quant.calibration.samples=20"]
    sizes = {"classes": 4, "image_size": 16, "train_images": 40, "test_images": 10}
    data = [f"data.dataset.{key}={value}" for key, value in sizes.items()]
    model, output = tmp_path / "model", tmp_path / "out"
    convert = ["convert", "tests.exporting.networks:plain", *given, *data, "--target", "finn", "-o", str(model)]
    result = CliRunner().invoke(cli, convert)
    assert result.exit_code == 0, result.output
    arguments = ["export", str(model), "-p", "4", "-p", "2", "-f", "finn", "--estimate", "--no-emulate"]
    result = CliRunner().invoke(cli, [*arguments, "--images", "10", "-o", str(output)])
    assert result.exit_code == 0, result.output
    for words in (
        "Cost of 4 on an FPGA",
        "Cost of 2 on an FPGA",
        "Precisions side by side",
        "BRAM 18k",
        "images/s",
        "Pynq-Z1 has",
        "fits",
    ):
        assert words in result.stdout
    costs = {}
    for bits in (4, 2):
        report = json.loads((output / str(bits) / "export-report.json").read_text())
        costs[bits] = sum(layer["lut"] for layer in report["estimate"]["layers"])
        folding = json.loads((output / str(bits) / "folding_config.json").read_text())
        assert any("SIMD" in settings for settings in folding.values())
        assert report["emulation"] is None
    assert 0 < costs[2] < costs[4]
    assert "not checked with finn itself" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("hls4ml")
def test_hls4ml_computes_bit_for_bit_what_the_network_computes(tmp_path: Path) -> None:
    given, form = loaded(Ported(), target="hls4ml"), find_format("hls4ml")
    report = export(given, Precision.parse(4), form, tmp_path / "out", split=None, emulate=True)
    assert report.emulation is not None
    assert not report.unchecked
    assert max(report.emulation.differences.values()) < 1e-6
    assert report.emulation.version.startswith("1.")
    assert np.load(tmp_path / "out" / "expected_output.npy").std() > 1e-2


@pytest.fixture
def impostor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python that is no compiler's."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: finn' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setenv("QADTR_BREVITAS_FINN", str(python))
    return python


def test_what_a_compiler_says_is_passed_on_and_nothing_is_left(impostor: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"finn does not build the network \(ModuleNotFoundError: finn\): for all"):
        export(
            loaded(plain(), target="finn"),
            Precision.parse(4),
            find_format("finn"),
            tmp_path / "out",
            split=None,
            with_estimate=True,
        )
    assert list(tmp_path.iterdir()) == [impostor]


def test_a_compiler_that_a_signal_stops_says_so_and_not_its_last_warning(impostor: Path, tmp_path: Path) -> None:
    impostor.write_text("#!/bin/sh\necho 'UserWarning: all is well' >&2\nkill -SEGV $$\n")
    with pytest.raises(ExportError, match=r"finn does not build the network \(.*SIGSEGV") as found:
        run_compiler(Finn(), tmp_path)
    assert "UserWarning" not in str(found.value)


def test_a_compiler_that_computes_something_else_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"version": "1", "differences": {"step_tidy_up": 0.0, "step_convert_to_hw": 0.5}, "largest": 4.0}
    monkeypatch.setattr("qadtr_brevitas.exporting.estimate.run_compiler", lambda *given: found)
    with pytest.raises(ExportError, match=r"step_convert_to_hw: logits differ by 0\.5, the largest is 4"):
        try_compiler(Finn(), tmp_path, emulate=True, with_estimate=False)
    found["differences"]["step_convert_to_hw"] = 1e-6
    emulation, estimate = try_compiler(Finn(), tmp_path, emulate=True, with_estimate=False)
    assert emulation is not None
    assert (emulation.compiler, emulation.largest, estimate) == ("finn", 4.0, None)


def test_a_format_without_a_compiler_cannot_be_emulated(tmp_path: Path) -> None:
    four, form = Precision.parse(4), find_format("qonnx")
    with pytest.raises(UsageError, match=r"qonnx is for no compiler.*--emulate"):
        export(loaded(plain()), four, form, tmp_path / "out", split=None, emulate=True)


def test_the_python_that_is_named_comes_before_this_one(impostor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_python(Finn()) == impostor
    monkeypatch.setattr("qadtr_brevitas.exporting.estimate.version", lambda package: "1.6.1")
    assert compiler_python(Finn()) == impostor
    monkeypatch.delenv("QADTR_BREVITAS_FINN")
    assert compiler_python(Finn()) == Path(sys.executable)


@pytest.mark.parametrize(("has", "fits"), [({}, None), ({"lut": 200, "dsp": 4}, True), ({"lut": 200, "dsp": 3}, False)])
def test_whether_it_fits_a_board(has: dict[str, int], fits: bool | None) -> None:
    layer = LayerCost(name="MVAU", lut=100, bram_18k=0, uram=0, dsp=2, cycles=1)
    assert Estimate(layers=(layer, layer), fps=1, latency_ns=1, clock_ns=1, available=has).fits is fits


def test_a_model_that_was_not_converted_for_it_is_refused_with_its_layers(tmp_path: Path) -> None:
    given = loaded(Ported(), precisions=(4,))
    with pytest.raises(ExportError, match=r"block.*: adds activations that are not quantized.*--target finn"):
        export(given, Precision.parse(4), find_format("finn"), tmp_path / "out", split=None)
    assert not list(tmp_path.iterdir())
