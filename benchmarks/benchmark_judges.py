"""Who else accepts an exported network, and on how many images does it compute the same?

    make judges                                       # every network in every format that takes it: hours
    python -m benchmarks.benchmark_judges --network cifar_resnet8b --format finn --format qcdq

For each network and format: the file is written (a refusal is a row too), and every judge of the format tries it:
onnx's checker, qonnx's and onnxruntime's executors on clean images and on images with random patches, and the FPGA
compilers themselves where `make compilers` has put them, on one image. A judge says on how many images it gives the
class that the switchable network gives. Beside them the size of the file, and milliseconds an image in onnxruntime on
one thread: of the file, of the float network, of onnxruntime's quantize_static and of Brevitas's own export.

Weights and images are those of benchmark_export.py: published ones where QADTR_BREVITAS_DATA names a folder with them.
Random weights get BatchNorm statistics of the images, without which all images have one class. Random weights make
MobileNetV2 pass the last bit of a sum on louder and louder, so it is trained on CIFAR-10 for some minutes, once; its
weights lie beside --output. Each pair of network and format runs in a process of its own and is stopped after --limit
minutes; pairs that --output has are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.benchmark_export import CALIBRATION, make_case, quantize_static, session
from benchmarks.trained_case import trained_case

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qadtr_brevitas.exporting import Format

    Classifier = Callable[[Tensor], Tensor]

# The name of timm, torchvision or this package, and the side of its images; None for the network's own.
_CIFAR = ("resnet8", "resnet8b", "resnet20", "resnet20b", "resnet56", "resnet56b", "vgg16")
NETWORKS: dict[str, tuple[str, int | None]] = {
    **{f"cifar_{name}": (f"cifar_{name}", None) for name in _CIFAR},
    "mobilenetv2": ("mobilenetv2_050", 64),
    "resnet18": ("resnet18", 64),
    "efficientnet_lite0": ("tf_efficientnet_lite0", None),
    "deit_tiny": ("deit_tiny_patch16_224", None),
}
# Of random weights no judge of files: what is trained first, and for how many steps.
TRAINED = {"mobilenetv2": 200}
BITS = {"finn": 4, "hls4ml": 4, "qonnx": 4, "qcdq": 8, "ort": 8}
PATCH = 0.25
ROUNDS = 10
# Larger images are fewer: qonnx keeps every activation of all images.
LARGE, SHARE = 64, 5
LIMIT = 10.0


@dataclass(frozen=True)
class Written:
    """A file, what it should compute, and images (N, C, H, W) in [0, 1], clean and patched, with the right logits."""

    form: Format
    file: Path
    images: dict[str, Tensor]
    logits: dict[str, Tensor]


def onnx_checker(written: Written) -> str:
    """onnx's own checker, which knows the operators of standard ONNX only."""
    import onnx

    onnx.checker.check_model(str(written.file), full_check=True)
    return "accepted"


def executor(written: Written) -> str:
    """Whatever the format's own loader executes the file with: onnxruntime, or qonnx."""
    return agreement(written, written.form.load(written.file))


def onnxruntime(written: Written) -> str:
    """onnxruntime with all of its optimizations."""
    return agreement(written, one_by_one(session(written.file)))


def compiler(written: Written) -> str:
    """The FPGA compiler itself, on the image of the folder."""
    from qadtr_brevitas.exporting.estimate import try_compiler

    assert written.form.compiler is not None
    emulation, _ = try_compiler(written.form.compiler, written.file.parent, emulate=True, with_estimate=False)
    assert emulation is not None
    last = list(emulation.differences.values())[-1]
    return f"{emulation.compiler} {emulation.version}, 1 image, differs by {last:.1e} of {emulation.largest:.3g}"


JUDGES: dict[str, dict[str, Callable[[Written], str]]] = {
    "finn": {"qonnx": executor, "FINN": compiler},
    "hls4ml": {"qonnx": executor, "hls4ml": compiler},
    "qonnx": {"qonnx": executor},
    "qcdq": {"onnx.checker": onnx_checker, "onnxruntime": onnxruntime},
    "ort": {"onnx.checker": onnx_checker, "onnxruntime": onnxruntime},
}


def agreement(written: Written, classify: Classifier) -> str:
    """Return on how many images a classifier gives the network's class, and how far its logits are in the median."""
    import torch

    found = {kind: classify(images) for kind, images in written.images.items()}
    same = {kind: int((one.argmax(1) == written.logits[kind].argmax(1)).sum()) for kind, one in found.items()}
    largest = max(float(one.abs().max()) for one in written.logits.values())
    distance = torch.cat([(one - written.logits[kind]).abs().amax(1) for kind, one in found.items()])
    counts = ", ".join(f"{count}/{len(written.images[kind])} {kind}" for kind, count in same.items())
    return f"{counts} ({float(distance.median()) / largest:.0e})"


def one_by_one(classify: Classifier) -> Classifier:
    """Return a classifier that gives a file one image at a time."""
    import torch

    return lambda images: torch.cat([classify(image) for image in images.split(1)])


def patched(images: Tensor) -> Tensor:
    """Return the images with a square of noise at a random place each, of a quarter of their side."""
    import torch

    draw = torch.Generator().manual_seed(1)
    found, side = images.clone(), max(1, int(images.shape[-1] * PATCH))
    for image in found:
        top, left = (int(torch.randint(images.shape[-1] - side + 1, (), generator=draw)) for _ in range(2))
        noise = torch.randint(256, (images.shape[1], side, side), generator=draw) / 255
        image[:, top : top + side, left : left + side] = noise
    return found


def milliseconds(network: Any, quantized: Any, images: Tensor, file: Path) -> dict[str, float]:
    """Processor time for an image on one thread, the least of several rounds in which all files take turns.

    Of the file, of the float network, of what quantize_static makes of it (U8S8), and of Brevitas's export as it is.
    """
    import torch
    from brevitas.export import export_onnx_qcdq

    settings: dict[str, Any] = {"dynamo": False, "opset_version": 17, "input_names": ["images"]}
    image, folder = images[:1], file.parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (image,), str(folder / "float.onnx"), **settings)
        export_onnx_qcdq(quantized, args=image, export_path=str(folder / "brevitas.onnx"), **settings)
    quantize_static(folder / "float.onnx", folder / "static.onnx", images[:CALIBRATION].split(1), "QInt8")
    sessions = {name: session(folder / f"{name}.onnx") for name in ("float", "static", "brevitas")}
    sessions["file"] = session(file)
    least = dict.fromkeys(sessions, float("inf"))
    for _ in range(ROUNDS):
        for name, run in sessions.items():
            start = time.process_time()
            run(image)
            least[name] = min(least[name], 1e3 * (time.process_time() - start))
    return least


def settle_norms(net: nn.Module, images: Tensor) -> None:
    """Give BatchNorms the statistics of some images."""
    import torch
    from torch import nn

    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        net.train()(images)
    net.eval()
    for norm in norms:
        norm.momentum = 0.1


def measure(name: str, format_name: str, count: int, weights: Path) -> dict[str, Any]:
    """Return the row of one network in one format; a network that is trained has its weights in a file."""
    import torch
    from torch.nn import functional as F

    from qadtr_brevitas.core.errors import QadtrError
    from qadtr_brevitas.exporting import BuildTarget, find_format
    from qadtr_brevitas.exporting.build_files import write_build_files
    from qadtr_brevitas.exporting.ties import break_ties
    from qadtr_brevitas.quant import at_precision, calibrate, convert, freeze

    torch.set_num_threads(1)
    architecture, side = NETWORKS[name]
    if name in TRAINED:
        case = trained_case(architecture, count, side=side or 32, steps=TRAINED[name], weights=weights)
    else:
        case = make_case(architecture, count)
    clean = case.images if side is None else F.interpolate(case.images, (side, side), mode="area")
    if clean.shape[-1] >= LARGE:
        clean = clean[: max(1, count // SHARE)]
    # Whole bytes, as FINN takes them.
    clean = (clean * 255).round() / 255
    if not case.is_published:
        settle_norms(case.net, clean[:CALIBRATION])
    images, form = {"clean": clean, "patched": patched(clean)}, find_format(format_name)
    height, width = clean.shape[2:]
    bits = BITS[form.name]
    row: dict[str, Any] = {"network": name, "format": form.name, "bits": bits, "published": case.is_published}
    try:
        model = convert(case.net, [32, bits], image_size=(height, width), target=form.target).eval()
        calibrate(model, [clean[:CALIBRATION]])
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            folder = Path(scratch)
            frozen = freeze(model, bits)
            if form.compiler is not None and form.compiler.rounds_ties_up:
                frozen = break_ties(frozen, clean[:8])
            start = time.process_time()
            form.write(frozen, clean[:1], folder / "model.onnx")
            row["seconds_to_write"] = time.process_time() - start
            if form.compiler is not None:
                write_build_files(folder, form.compiler, frozen, clean[:1], BuildTarget(), takes_bytes=form.takes_bytes)
            row["megabytes"] = (folder / "model.onnx").stat().st_size / 1e6
            with at_precision(model, bits):
                logits = {kind: torch.cat([model(one) for one in batch.split(1)]) for kind, batch in images.items()}
            written = Written(form, folder / "model.onnx", images, logits)
            row["judges"] = {judge: _verdict(ask, written) for judge, ask in JUDGES[form.name].items()}
            if form.compiler is None and form.name != "qonnx":
                row["milliseconds"] = milliseconds(freeze(model, 32), frozen, clean, written.file)
    except QadtrError as error:
        row["refused"] = str(error)
    return row


def measure_within(name: str, format_name: str, count: int, minutes: float, weights: Path) -> dict[str, Any]:
    """Return the row as a process of its own measures it, or one that says that it took too long or why it failed."""
    bare = {"network": name, "format": format_name, "bits": BITS[format_name]}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "row.json"
        # A fork has the libraries that this process has loaded.
        process = multiprocessing.get_context("fork").Process(
            target=_write_row, args=(name, format_name, count, weights, scratch, output)
        )
        process.start()
        process.join(60 * minutes)
        if process.exitcode is None:
            # With the compilers that it started.
            os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
            return {**bare, "stopped": f"not done after {minutes:g} minutes"}
        if process.exitcode:
            return {**bare, "stopped": f"ended with exit code {process.exitcode}"}
        return json.loads(output.read_text())


def _write_row(name: str, format_name: str, count: int, weights: Path, scratch: str, output: Path) -> None:
    os.setsid()
    tempfile.tempdir = os.environ["TMPDIR"] = scratch
    output.write_text(json.dumps(measure(name, format_name, count, weights)))


def _verdict(ask: Callable[[Written], str], written: Written) -> str:
    try:
        return ask(written)
    except Exception as error:  # whatever a judge says against a file is its verdict
        return f"NO: {type(error).__name__}: {' '.join(str(error).split())[-400:]}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| network | format | MB | judges | ms an image: file / float / quantize_static / Brevitas |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        size = f"{row['megabytes']:.3g}" if "megabytes" in row else "-"
        judges = "; ".join(f"{judge}: {verdict}" for judge, verdict in row.get("judges", {}).items())
        times = row.get("milliseconds", {})
        speed = " / ".join(f"{times[key]:.2f}" for key in ("file", "float", "static", "brevitas")) if times else "-"
        what = judges or row.get("stopped") or f"refused: {row['refused'][:200]}"
        lines.append(f"| {row['network']} | {row['format']}, {row['bits']} bit | {size} | {what} | {speed} |")
    return "\n".join(lines)


def main() -> None:
    """Asks, prints and writes the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="again for more; all without it")
    parser.add_argument("--format", action="append", choices=JUDGES, help="again for more; all without it")
    parser.add_argument("--images", type=int, default=100, help="of 32x32; a fifth of it of larger ones")
    parser.add_argument("--limit", type=float, default=LIMIT, help="minutes for each pair; 0 for none")
    parser.add_argument("--output", type=Path, default=Path("bench_judges.json"))
    given = parser.parse_args()
    found = json.loads(given.output.read_text()) if given.output.is_file() else {"images": given.images, "rows": []}
    if found["images"] != given.images:
        parser.error(f"{given.output} is of --images {found['images']}: name another --output")
    # Once, for all processes.
    import_module("qadtr_brevitas.exporting")
    rows: list[dict[str, Any]] = found["rows"]
    done = {(row["network"], row["format"]) for row in rows}
    for name in given.network or NETWORKS:
        for form in given.format or JUDGES:
            if (name, form) in done:
                continue
            weights = given.output.with_name(f"{given.output.stem}_{name}.pt")
            if given.limit:
                row = measure_within(name, form, given.images, given.limit, weights)
            else:
                row = measure(name, form, given.images, weights)
            rows.append(row)
            print(json.dumps(row), flush=True)
            # Each row is kept, however long the next one takes.
            given.output.write_text(json.dumps({"images": given.images, "rows": rows}, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
