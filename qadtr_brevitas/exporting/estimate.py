"""What a network costs on an FPGA, by FINN's analytical estimates; and the compilers' own check of a folder.

The compilers live in Python environments of their own, made by `make compilers`; a variable names each one's Python.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qadtr_brevitas.core.errors import ExportError, UsageError
from qadtr_brevitas.core.files import write_json
from qadtr_brevitas.exporting.compiler import CLOCK_NS, Compiler

FOLDING_FILE = "folding_config.json"
_SCRIPTS = Path(__file__).parent / "compilers"
_LINES = 3
# Of the largest logit; integers are exact, and what is left are floats at the end.
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One hardware layer: look-up tables, 18-kbit block RAMs, UltraRAMs, multipliers, and clock cycles for an image."""

    name: str
    lut: float
    bram_18k: float
    uram: float
    dsp: float
    cycles: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a network costs.

    Args:
        layers: in order.
        fps: images per second, as fast as the slowest layer.
        latency_ns: from an image to its logits.
        clock_ns: clock period.
        board: what it was folded for.
        available: what the board has of each resource; empty where FINN does not tell.
        uncounted: names of the layers of which FINN has no estimate of look-up tables, and counts 0.
    """

    layers: tuple[LayerCost, ...]
    fps: float
    latency_ns: float
    clock_ns: float
    board: str = ""
    available: Mapping[str, int] = field(default_factory=dict[str, int])
    uncounted: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the board has as much of every resource; None where that is not known."""
        return all(self.total(name) <= count for name, count in self.available.items()) if self.available else None

    def total(self, resource: str) -> float:
        """Sum of a resource, `lut`, `bram_18k`, `uram` or `dsp`, over all layers."""
        return sum(getattr(layer, resource) for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class Emulation:
    """What a compiler itself computed, against the network in PyTorch.

    Args:
        compiler: its name.
        version: its version.
        images: how many images it was given.
        differences: largest absolute difference of two logits, by what was executed.
        largest: largest absolute logit of the network.
    """

    compiler: str
    version: str
    images: int
    differences: Mapping[str, float]
    largest: float


def compiler_python(compiler: Compiler) -> Path:
    """Return the Python that has a compiler: the one that its variable names, this one, or that of `make compilers`.

    Raises:
        UsageError: none has it.
    """
    named = os.environ.get(compiler.variable)
    if not named and _is_installed(compiler.package):
        return Path(sys.executable)
    given = Path(named or f".venv-{compiler.name}/bin/python")
    if not given.is_file():
        raise UsageError(
            f"there is no Python of {compiler.name} at {given}: make it with `make compilers` in a checkout of "
            f"qadtr-brevitas, and name it in {compiler.variable}"
        )
    # Not resolved: the link is what makes it the environment's.
    return given.absolute()


def missing_compiler(compiler: Compiler) -> str:
    """Return why a compiler cannot be run; nothing if it can."""
    try:
        compiler_python(compiler)
    except UsageError as error:
        return str(error)
    return ""


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def run_compiler(compiler: Compiler, folder: Path, *options: str) -> dict[str, Any]:
    """Has a compiler convert an exported folder, in its own environment; the folder stays as it is.

    Args:
        compiler: which one.
        folder: as `export` writes it.
        options: of the compiler's script.

    Returns:
        What the script found.

    Raises:
        UsageError: the compiler is not installed.
        ExportError: it refuses the network.
    """
    python = compiler_python(compiler)
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        script = _SCRIPTS / compiler.script
        done = subprocess.run(
            [python, script, folder.resolve(), result, *options],
            capture_output=True,
            text=True,
            check=False,
            cwd=scratch,
        )
        if done.returncode or not result.is_file():
            raise ExportError(
                f"{compiler.name} does not build the network ({_why(done.returncode, done.stderr)}): "
                f"for all it says, run {python} {script} FOLDER RESULT.json on an export made with --no-emulate"
            )
        return json.loads(result.read_text())


def _why(code: int, errors: str) -> str:
    """Return why a process ended, by its exit code, negative for a signal, and what it wrote."""
    if code < 0:
        return f"it was stopped by {signal.Signals(-code).name}, as where memory runs out"
    return " ".join(errors.strip().splitlines()[-_LINES:]) or f"exit code {code}"


def try_compiler(
    compiler: Compiler, folder: Path, *, emulate: bool, with_estimate: bool
) -> tuple[Emulation | None, Estimate | None]:
    """Let a compiler execute an exported folder, and estimate what it costs; the folding is written into the folder.

    Args:
        compiler: which one.
        folder: as `export` writes it.
        emulate: execute what the compiler makes of the network on the folder's image.
        with_estimate: estimate its costs.

    Raises:
        UsageError: the compiler is not installed.
        ExportError: it refuses the network, or computes something else.
    """
    if not (emulate or with_estimate):
        return None, None
    found = run_compiler(compiler, folder, *(() if emulate else ("--no-execute",)))
    emulation = _emulation(compiler, found) if emulate else None
    if not with_estimate:
        return emulation, None
    write_json(folder / FOLDING_FILE, found["folding"])
    return emulation, _estimate(found)


def _emulation(compiler: Compiler, found: Mapping[str, Any]) -> Emulation:
    differences: dict[str, float] = found.get("differences") or {"in the emulation": found["difference"]}
    last, difference = list(differences.items())[-1]
    if difference > _TOLERANCE * found["largest"]:
        raise ExportError(
            f"{compiler.name} itself computes something else ({last}: logits differ by {difference:.3g}, the largest "
            f"is {found['largest']:.3g}): nothing was kept. To look at the folder all the same, give --no-emulate"
        )
    return Emulation(
        compiler=compiler.name,
        version=found["version"],
        images=1,
        differences=differences,
        largest=found["largest"],
    )


def _estimate(found: Mapping[str, Any]) -> Estimate:
    layers = tuple(LayerCost(**layer) for layer in found["layers"])
    return Estimate(
        layers=layers,
        board=found["board"],
        available=found["available"],
        uncounted=tuple(layer.name for layer in layers if not layer.lut),
        fps=found["fps"],
        latency_ns=found["latency_ns"],
        clock_ns=CLOCK_NS,
    )
