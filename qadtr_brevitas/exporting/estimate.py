"""What a network costs on an FPGA, by FINN's analytical estimates; and the compilers' own check of a folder.

The compilers live in Python environments of their own, made by `make compilers`; a variable names each one's Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadtr_brevitas.core.errors import ExportError, UsageError
from qadtr_brevitas.core.files import write_json
from qadtr_brevitas.exporting.compiler import CLOCK_NS, Compiler

FOLDING_FILE = "folding_config.json"
_SCRIPTS = Path(__file__).parent / "compilers"
_LINES = 3


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
    """

    layers: tuple[LayerCost, ...]
    fps: float
    latency_ns: float
    clock_ns: float

    def total(self, resource: str) -> float:
        """Sum of a resource, `lut`, `bram_18k`, `uram` or `dsp`, over all layers."""
        return sum(getattr(layer, resource) for layer in self.layers)


def compiler_python(compiler: Compiler) -> Path:
    """Return the Python of a compiler's environment.

    Raises:
        UsageError: it is not there.
    """
    given = Path(os.environ.get(compiler.variable) or f".venv-{compiler.name}/bin/python")
    if not given.is_file():
        raise UsageError(
            f"there is no Python of {compiler.name} at {given}: make it with `make compilers` in a checkout of "
            f"qadtr-brevitas, and name it in {compiler.variable}"
        )
    # Not resolved: the link is what makes it the environment's.
    return given.absolute()


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
            last = " ".join(done.stderr.strip().splitlines()[-_LINES:])
            raise ExportError(
                f"{compiler.name} does not build the network ({last or f'exit code {done.returncode}'}): "
                f"for all it says, run {python} {script} FOLDER RESULT.json on an export made without --estimate"
            )
        return json.loads(result.read_text())


def estimate(compiler: Compiler, folder: Path) -> Estimate:
    """FINN's estimates for an exported folder, in which the folding they are for is written.

    Raises:
        UsageError, ExportError: as `run_compiler`.
    """
    found = run_compiler(compiler, folder, "--no-execute")
    write_json(folder / FOLDING_FILE, found["folding"])
    return Estimate(
        layers=tuple(LayerCost(**layer) for layer in found["layers"]),
        fps=found["fps"],
        latency_ns=found["latency_ns"],
        clock_ns=CLOCK_NS,
    )
