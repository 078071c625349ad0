"""What does quantization after training cost? Conversion and calibration against float forwards, time and memory.

    make bench                                # or: python examples/benchmark_ptq.py --method percentile

For each network, with random weights: (a) the processor seconds of `convert` and `calibrate` over those of as many
float forwards, of one thread, so that other work on the machine counts as little as possible; (b) the highest memory
of a process that makes the network, converts and calibrates it, over that of one that makes it and runs it on the
same batches, both less what Python and the libraries take. Memory is read from /proc, so on Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

DEFAULT_MODELS = ("deit_base_patch16_224", "swin_small_patch4_window7_224")


def memory(key: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def run(name: str, method: str | None, images: int, batch_size: int) -> dict[str, float]:
    """Runs a network on images, or converts and calibrates it on them if there is a method; seconds and peak bytes."""
    import timm
    import torch

    import qadtr_brevitas.models  # noqa: F401  (registers the CIFAR models with timm)
    from qadtr_brevitas.quant import calibrate, convert

    torch.set_num_threads(1)
    torch.manual_seed(0)
    libraries = memory("VmRSS")
    net = timm.create_model(name).eval()
    size = net.pretrained_cfg["input_size"]
    batches = [torch.rand(min(batch_size, images - start), *size) for start in range(0, images, batch_size)]
    with torch.no_grad():
        net(batches[0][:1])
        start = time.process_time()
        if method is None:
            for batch in batches:
                net(batch)
        else:
            # As the command line does it: the float network is not needed any more.
            model, _ = convert(net, in_place=True)
            calibrate(model, batches, method=method)
    return {"seconds": time.process_time() - start, "peak_bytes": memory("VmHWM") - libraries}


def measure(name: str, method: str, images: int, batch_size: int) -> dict[str, object]:
    """Both ways, each in a process of its own, so that one's memory is not the other's."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        one = partial(run, name, images=images, batch_size=batch_size)
        plain = processes.submit(one, None).result()
        quantized = processes.submit(one, method).result()
    ratios = {f"{key}_ratio": quantized[key] / plain[key] for key in plain}
    return {"model": name, "float": plain, "quantization": quantized, **ratios}


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=DEFAULT_MODELS, help="timm names")
    parser.add_argument("--method", default="mse", choices=("minmax", "percentile", "mse"))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("bench_ptq.json"))
    arguments = parser.parse_args()
    results: list[dict[str, object]] = []
    for name in arguments.models:
        result = measure(name, arguments.method, arguments.images, arguments.batch_size)
        print(
            f"{name}: {result['seconds_ratio']:.2f}x the time of float forwards, "
            f"{result['peak_bytes_ratio']:.2f}x the memory ({arguments.method}, {arguments.images} images)"
        )
        results.append(result)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("models", "output")}
    document = {**settings, "results": results, "machine": platform.processor(), "threads": 1}
    arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
