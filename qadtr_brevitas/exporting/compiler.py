"""What every FPGA compiler needs beside the model file, and how it is reached."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from qadtr_brevitas.core.errors import UsageError, suggest

CLOCK_NS = 10.0


@dataclass(frozen=True, kw_only=True)
class BuildTarget:
    """The hardware to build for.

    Args:
        board: one that FINN knows.
        fps: images per second to start folding from (FINN).
        part: FPGA part (hls4ml).
    """

    board: str = "Pynq-Z1"
    fps: int = 100
    part: str = "xc7z020clg400-1"


def check_build_options(given: Collection[str], build: BuildTarget, compiler: Compiler | None, form: str) -> None:
    """Refuse options that a format would ignore, and boards and parts that there are none of.

    Args:
        given: names of the fields of `build` that were chosen.
        build: what to build for.
        compiler: that of the format; None if it has none.
        form: name of the format.

    Raises:
        UsageError: a field that the format does not read, or a value that is not possible.
    """
    known = () if compiler is None else compiler.options
    if ignored := [f"--{name}" for name in given if name not in known]:
        reads = f"reads {', '.join(f'--{name}' for name in known)} only" if known else "is for no board"
        raise UsageError(f"{', '.join(ignored)}: the format {form} {reads}: leave it out")
    if compiler is None:
        return
    if compiler.boards and build.board not in compiler.boards:
        raise UsageError(f"{compiler.name} knows no board {build.board!r}: {suggest(build.board, compiler.boards)}")
    if not re.fullmatch(r"[a-z0-9]+(-[A-Za-z0-9]+)*", build.part):
        raise UsageError(f"{build.part!r} is no name of an FPGA part: give one such as {BuildTarget.part}")


class Compiler(ABC):
    """An FPGA compiler that an export is a folder for.

    Attributes:
        name: of the compiler, of its format and of the target that models are converted for.
        package: its name on PyPI.
        variable: environment variable that names the Python of its environment.
        script: in `exporting/compilers/`, run there to build a folder.
        power_of_two: whether steps have to be powers of two.
        averages_floats: whether it can average activations that are not quantized.
        rounds_ties_up: whether values halfway between two levels are rounded up, and not to even.
        estimates: whether it can tell what a network costs.
        options: the fields of `BuildTarget` that it reads.
        boards: the boards that it knows; empty if it reads none.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    variable: ClassVar[str]
    script: ClassVar[str]
    power_of_two: ClassVar[bool] = False
    averages_floats: ClassVar[bool] = False
    rounds_ties_up: ClassVar[bool] = False
    estimates: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()
    boards: ClassVar[tuple[str, ...]] = ()

    def limits(self, model: Any, node: Any) -> Iterator[str]:
        """Yield what this compiler alone cannot take of a node, each with what to do about it.

        Args:
            model: a qonnx ModelWrapper with all shapes.
            node: one of its nodes.
        """
        yield from ()

    @abstractmethod
    def adapt(self, model: Any) -> None:
        """Rewrite what this compiler alone wants otherwise, such as how a graph takes pixels, in place.

        Args:
            model: a qonnx ModelWrapper with all shapes.
        """

    @abstractmethod
    def write_build_files(self, folder: Path, model_file: Path, build: BuildTarget) -> None:
        """Write configuration and instructions into a folder with the model file.

        Args:
            folder: where to write.
            model_file: the model.
            build: the hardware to build for.
        """
