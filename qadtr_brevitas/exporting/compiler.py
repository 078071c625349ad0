"""What every FPGA compiler needs beside the model file, and how it is reached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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


class Compiler(ABC):
    """An FPGA compiler that an export is a folder for.

    Attributes:
        name: of the compiler, of its format and of the target that models are converted for.
        variable: environment variable that names the Python of its environment.
        script: in `exporting/compilers/`, run there to build a folder.
        power_of_two: whether steps have to be powers of two.
        rounds_ties_up: whether values halfway between two levels are rounded up, and not to even.
        estimates: whether it can tell what a network costs.
    """

    name: ClassVar[str]
    variable: ClassVar[str]
    script: ClassVar[str]
    power_of_two: ClassVar[bool] = False
    rounds_ties_up: ClassVar[bool] = False
    estimates: ClassVar[bool] = False

    @abstractmethod
    def adapt_input(self, model: Any) -> None:
        """Rewrite how a graph takes pixels, in place.

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
