"""Who else accepts an exported network, and on how many images does it compute the same?

    make judges                                       # every network in every format that takes it: hours
    python -m benchmarks.benchmark_judges --network cifar_resnet8b --format finn --format qcdq

For each network and format: the file is written (a refusal is a row too), and every judge of the format tries it:
onnx's checker, qonnx's and onnxruntime's executors on clean images and on images with random patches, and the FPGA
compilers themselves where `make compilers` has put them, on one image. A judge says on how many images it gives the
class that the switchable network gives. Beside them the size of the file, and milliseconds an image in onnxruntime on
one thread: of the file, of the float network, of onnxruntime's quantize_static and of Brevitas's own export.

Weights and images are those of benchmark_export.py: published ones where QADTR_BREVITAS_DATA names a folder with them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.benchmark_export import CALIBRATION, make_case, quantize_static, session

if TYPE_CHECKING:
    from torch import Tensor

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
BITS = {"finn": 4, "hls4ml": 4, "qonnx": 4, "qcdq": 8, "ort": 8}
PATCH = 0.25
ROUNDS = 5


@dataclass(frozen=True)
class Written:
    """A file, what it should compute, and images (N, C, H, W) in [0, 1], clean and patched, with the right classes."""

    form: Format
    file: Path
    images: dict[str, Tensor]
    classes: dict[str, Tensor]


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
    """Return on how many images a classifier gives the network's class."""
    same = {
        kind: int((classify(images).argmax(1) == written.classes[kind]).sum())
        for kind, images in written.images.items()
    }
    return ", ".join(f"{count}/{len(written.images[kind])} {kind}" for kind, count in same.items())


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


def milliseconds(file: Path, image: Tensor) -> float:
    """Processor time for an image in onnxruntime on one thread, the least of several runs."""
    run, least = session(file), float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        run(image)
        least = min(least, time.process_time() - start)
    return 1e3 * least


def others(network: Any, quantized: Any, images: Tensor, folder: Path) -> dict[str, float]:
    """Milliseconds an image of the float network, of quantize_static, and of Brevitas's export as it is."""
    import torch
    from brevitas.export import export_onnx_qcdq

    settings: dict[str, Any] = {"dynamo": False, "opset_version": 17, "input_names": ["images"]}
    image = images[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (image,), str(folder / "float.onnx"), **settings)
        export_onnx_qcdq(quantized, args=image, export_path=str(folder / "brevitas.onnx"), **settings)
    quantize_static(folder / "float.onnx", folder / "static.onnx", images[:CALIBRATION].split(1), "QUInt8")
    return {name: milliseconds(folder / f"{name}.onnx", image) for name in ("float", "static", "brevitas")}


def measure(name: str, forms: list[str], count: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each format of one network."""
    import torch
    from torch.nn import functional as F

    from qadtr_brevitas.core.errors import QadtrError
    from qadtr_brevitas.exporting import BuildTarget, find_format
    from qadtr_brevitas.exporting.build_files import write_build_files
    from qadtr_brevitas.exporting.ties import break_ties
    from qadtr_brevitas.quant import at_precision, calibrate, convert, freeze

    torch.set_num_threads(1)
    architecture, side = NETWORKS[name]
    case = make_case(architecture, count)
    clean = case.images if side is None else F.interpolate(case.images, (side, side), mode="area")
    # Whole bytes, as FINN takes them.
    images = {"clean": (clean * 255).round() / 255, "patched": patched((clean * 255).round() / 255)}
    height, width = clean.shape[2:]
    for form in map(find_format, forms):
        bits = BITS[form.name]
        row: dict[str, Any] = {"network": name, "format": form.name, "bits": bits}
        try:
            model = convert(case.net, [32, bits], image_size=(height, width), target=form.target).eval()
            calibrate(model, [images["clean"][:CALIBRATION]])
            with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
                folder = Path(scratch)
                frozen = freeze(model, bits)
                if form.compiler is not None and form.compiler.rounds_ties_up:
                    frozen = break_ties(frozen, images["clean"][:8])
                form.write(frozen, images["clean"][:1], folder / "model.onnx")
                if form.compiler is not None:
                    build = BuildTarget()
                    write_build_files(
                        folder, form.compiler, frozen, images["clean"][:1], build, takes_bytes=form.takes_bytes
                    )
                row["megabytes"] = (folder / "model.onnx").stat().st_size / 1e6
                with at_precision(model, bits):
                    classes = {kind: model(batch).argmax(1) for kind, batch in images.items()}
                written = Written(form, folder / "model.onnx", images, classes)
                row["judges"] = {judge: _verdict(ask, written) for judge, ask in JUDGES[form.name].items()}
                if form.compiler is None and form.name != "qonnx":
                    own = milliseconds(written.file, images["clean"][:1])
                    row["milliseconds"] = {"file": own, **others(freeze(model, 32), frozen, images["clean"], folder)}
        except QadtrError as error:
            row["refused"] = str(error)
        yield row


def _verdict(ask: Callable[[Written], str], written: Written) -> str:
    try:
        return ask(written)
    except Exception as error:  # whatever a judge says against a file is its verdict
        return f"NO: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"


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
        what = judges or f"refused: {row['refused'][:200]}"
        lines.append(f"| {row['network']} | {row['format']}, {row['bits']} bit | {size} | {what} | {speed} |")
    return "\n".join(lines)


def main() -> None:
    """Asks, prints and writes the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="again for more; all without it")
    parser.add_argument("--format", action="append", choices=JUDGES, help="again for more; all without it")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("bench_judges.json"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.network or NETWORKS:
        for row in measure(name, arguments.format or list(JUDGES), arguments.images):
            rows.append(row)
            print(json.dumps(row), flush=True)
            # Each row is kept, however long the next one takes.
            arguments.output.write_text(json.dumps({"images": arguments.images, "rows": rows}, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
