"""What does quantization after training cost? Conversion and calibration against float forwards, time and memory.

    make bench                                # or: python benchmarks/benchmark_ptq.py --method percentile

For each network, with random weights: (a) the processor seconds of `convert` and `calibrate` over those of as many
float forwards as they make, of one thread; each batch is run in float just before calibration takes it, so that other
work on the machine slows both alike; (b) the highest memory of a process that makes the network, converts and
calibrates it, over that of one that makes it and runs it on the same batches, both less what Python and the libraries
take. Memory is read from /proc, so on Linux only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
DEFAULT_MODELS = ("deit_base_patch16_224", "swin_small_patch4_window7_224")


class Batches:
    """Images in [0, 1], each batch run through a float network before it is handed out, if there is one.

    Args:
        size: channels, height and width.
        images: how many in all.
        batch_size: how many at once.
        net: the float network.
    """

    def __init__(self, size: tuple[int, int, int], images: int, batch_size: int, net: nn.Module | None = None) -> None:
        self.size, self.net, self.seconds = size, net, 0.0
        self.counts = [min(batch_size, images - start) for start in range(0, images, batch_size)]

    def __len__(self) -> int:
        return len(self.counts)

    def __iter__(self) -> Iterator[Tensor]:
        import torch

        for count in self.counts:
            batch = torch.rand(count, *self.size)
            if self.net is not None:
                start = time.process_time()
                self.net(batch)
                self.seconds += time.process_time() - start
            yield batch


def prepared(name: str) -> Any:
    """The float network, with one thread and random weights."""
    import torch

    from qadtr_brevitas.models.create import create_float_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return create_float_model(name, num_classes=1000).eval()


def quantize(net: nn.Module, batches: Batches, method: str) -> None:
    """Converts and calibrates as the command line does: the float network is not needed afterwards."""
    from qadtr_brevitas.quant import calibrate, convert

    model = convert(net, in_place=True)
    calibrate(model, batches, method=method)


def load_quantization() -> None:
    importlib.import_module("qadtr_brevitas.quant")


def seconds(name: str, method: str, images: int, batch_size: int) -> dict[str, float]:
    """Processor seconds of float forwards, and of conversion and calibration on the same images."""
    import copy

    import torch

    load_quantization()  # so that loading Brevitas is not timed
    net = prepared(name)
    size, twin = net.pretrained_cfg["input_size"], copy.deepcopy(net)
    with torch.no_grad():
        twin(torch.rand(1, *size))
        # Conversion runs the network on two images.
        list(probe := Batches(size, 2, 2, twin))
        batches = Batches(size, images, batch_size, twin)
        start = time.process_time()
        quantize(net, batches, method)
        spent = time.process_time() - start - batches.seconds
    return {"float": probe.seconds + batches.seconds, "quantization": spent}


def memory(key: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def peak_bytes(name: str, method: str | None, images: int, batch_size: int) -> int:
    """Most memory beyond the libraries', of float forwards or, if there is a method, conversion and calibration."""
    import torch

    load_quantization()  # so that it counts as one of the libraries
    libraries = memory("VmRSS")
    net = prepared(name)
    batches = Batches(net.pretrained_cfg["input_size"], images, batch_size)
    with torch.no_grad():
        if method is None:
            for batch in batches:
                net(batch)
        else:
            quantize(net, batches, method)
    return memory("VmHWM") - libraries


def apart(function: Callable[..., T], *arguments: object) -> T:
    """Runs a function in a process of its own, so that its memory is nobody else's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def measure(name: str, method: str, images: int, batch_size: int) -> dict[str, Any]:
    """Seconds, bytes and ratios for one network."""
    times = apart(seconds, name, method, images, batch_size)
    peaks = {
        kind: apart(peak_bytes, name, how, images, batch_size)
        for kind, how in (("float", None), ("quantization", method))
    }
    return {
        "model": name,
        "seconds": times,
        "seconds_ratio": times["quantization"] / times["float"],
        "peak_bytes": peaks,
        "peak_ratio": peaks["quantization"] / peaks["float"],
    }


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=DEFAULT_MODELS, help="timm names")
    parser.add_argument("--method", default="mse", choices=("minmax", "percentile", "mse"))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("bench_ptq.json"))
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name in arguments.models:
        result = measure(name, arguments.method, arguments.images, arguments.batch_size)
        print(
            f"{name}: {result['seconds_ratio']:.2f}x the time of float forwards, "
            f"{result['peak_ratio']:.2f}x the memory ({arguments.method}, {arguments.images} images)"
        )
        results.append(result)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("models", "output")}
    document = {**settings, "results": results, "machine": platform.processor(), "threads": 1}
    arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
