"""What does an exported network cost on a CPU? onnxruntime in integers against float ONNX and PyTorch, in one run.

    make bench                                # or: python benchmarks/benchmark_export.py --images 320

For each network, converted with --target ort and calibrated at 8 bit: processor seconds for a batch of one thread, the
least of several rounds in which all forms take turns, so that other work on the machine slows them alike; bytes of the
file; and how many images get the right class, or, without labels, the class that the quantized network in PyTorch
gives. Beside them what `onnxruntime.quantization.quantize_static` makes of the float file, with signed and with
unsigned bytes as weights: signed ones saturate on x86 processors without VNNI.

Networks have their published weights where QADTR_BREVITAS_DATA names a folder with them, and else random ones; CIFAR
networks see CIFAR-10 where that folder has it, and all others smooth noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qadtr_brevitas.quant import SwitchableModel

CHECKPOINTS = {
    "cifar_resnet20": "resnet20_cifar10.safetensors",
    "cifar_resnet56": "resnet56_cifar10.safetensors",
    "squeezenet1_1": "squeezenet1_1.safetensors",
    "tf_efficientnet_lite0": "tf_efficientnet_lite0.safetensors",
}
DEFAULT_MODELS = ("cifar_resnet20", "squeezenet1_1", "tf_efficientnet_lite0", "resnet18", "deit_tiny_patch16_224")
BITS = 8
# Images.
CALIBRATION = 16
# In a row, of each form in each round.
RUNS = 3
FEW = ("onnxruntime, float", "onnxruntime, ort", "quantize_static, U8S8")


@dataclass(frozen=True)
class Case:
    """A float network with what it is to be run on: images (N, C, H, W) in [0, 1], and labels if it knows any."""

    name: str
    net: nn.Module
    images: Tensor
    labels: Tensor | None
    is_published: bool


def make_case(name: str, images: int) -> Case:
    """The network with published weights, where these are, and images.

    CIFAR networks get CIFAR-10, others pictures of ImageNet's sample if their weights are published, else smooth noise.
    """
    import torch

    from qadtr_brevitas.core.errors import DataError
    from qadtr_brevitas.core.registry import DATASETS
    from qadtr_brevitas.data.image_folder import ImageFolder
    from qadtr_brevitas.models.create import create_float_model, own_image_size
    from qadtr_brevitas.models.weights import load_into, load_weights

    torch.manual_seed(0)
    checkpoint = Path(os.environ.get("QADTR_BREVITAS_DATA", ".")) / CHECKPOINTS.get(name, "-")
    is_cifar, is_published = name.startswith("cifar_"), checkpoint.is_file()
    net = create_float_model(name, num_classes=10 if is_cifar else 1000, args={}).eval()
    if is_published:
        load_into(net, load_weights(checkpoint), source=str(checkpoint), name=name)
    if is_cifar:
        try:
            split = DATASETS.load("cifar10")().load("test", limit=images, seed=0)
        except DataError:
            pass
        else:
            batch, labels = split.batch(torch.arange(len(split)))
            return Case(name, net, batch, labels if is_published else None, is_published)
    size, crop = own_image_size(name, {})
    sample = checkpoint.parent / "imagenet1k-sample.tar"
    if is_published and sample.is_file():
        pictures = ImageFolder(root=str(sample), holdout=4).fitted(size, crop).load("test", limit=images, seed=0)
        return Case(name, net, *pictures.batch(torch.arange(len(pictures))), is_published)
    coarse = torch.rand(images, 3, 8, 8)
    noise = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return Case(name, net, noise, None, is_published)


def make_quantized(case: Case) -> SwitchableModel:
    """The network at 32 and 8 bit, calibrated on the first images."""
    from qadtr_brevitas.quant import calibrate, convert

    height, width = case.images.shape[2:]
    model = convert(case.net, [32, BITS], image_size=(height, width), target="ort")
    calibrate(model, [case.images[:CALIBRATION]])
    return model.eval()


def session(path: Path) -> Callable[[Tensor], Tensor]:
    """The file in onnxruntime, with all optimizations and one thread."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # It warns of every constant of other exporters' files.
    options.log_severity_level = 3
    made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = made.get_inputs()[0].name
    return lambda images: torch.from_numpy(made.run(None, {name: images.numpy()})[0])


def quantize_static(path: Path, output: Path, batches: Sequence[Tensor], weights: str) -> None:
    """What onnxruntime's own quantizer makes of a file, with steps per channel."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        """Every batch, once."""

        def __init__(self) -> None:
            self.batches = iter([{"images": batch.numpy()} for batch in batches])

        def get_next(self) -> Any:
            """Return the next batch, or None."""
            return next(self.batches, None)

    prepared = path.with_suffix(".prepared")
    quant_pre_process(str(path), str(prepared))
    quantization.quantize_static(
        str(prepared),
        str(output),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=getattr(quantization.QuantType, weights),
    )


def make_forms(
    model: SwitchableModel, images: Tensor, batch_size: int, folder: Path
) -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
    """Each form of the network by its name: what runs it, and the bytes of its file or weights."""
    import warnings

    import torch

    from qadtr_brevitas.exporting import find_format
    from qadtr_brevitas.quant import freeze

    batch = images[:batch_size]
    floats, quantized = freeze(model, 32), freeze(model, BITS)
    for form in ("qcdq", "ort"):
        find_format(form).write(quantized, batch, folder / f"{form}.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            floats, (batch,), str(folder / "float.onnx"), dynamo=False, opset_version=17, input_names=["images"]
        )
    for kind in ("QInt8", "QUInt8"):
        quantize_static(
            folder / "float.onnx", folder / f"static-{kind}.onnx", images[:CALIBRATION].split(batch_size), kind
        )
    bytes_of = {path.stem: path.stat().st_size for path in folder.glob("*.onnx")}
    return {
        "PyTorch, float": (floats, bytes_of["float"]),
        f"PyTorch, Brevitas at {BITS} bit": (quantized, bytes_of["float"]),
        "onnxruntime, float": (session(folder / "float.onnx"), bytes_of["float"]),
        "onnxruntime, qcdq": (session(folder / "qcdq.onnx"), bytes_of["qcdq"]),
        "onnxruntime, ort": (session(folder / "ort.onnx"), bytes_of["ort"]),
        "quantize_static, U8S8": (session(folder / "static-QInt8.onnx"), bytes_of["static-QInt8"]),
        "quantize_static, U8U8": (session(folder / "static-QUInt8.onnx"), bytes_of["static-QUInt8"]),
    }


def measure(name: str, images: int, batch_size: int, rounds: int, *, few: bool) -> dict[str, Any]:
    """Time, size and accuracy of every form of one network, or of the few that `--few` names."""
    import torch

    torch.set_num_threads(1)
    case = make_case(name, images)
    model = make_quantized(case)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        forms = make_forms(model, case.images, batch_size, Path(folder))
        brevitas = f"PyTorch, Brevitas at {BITS} bit"
        expected = torch.cat([forms[brevitas][0](batch).argmax(1) for batch in case.images.split(batch_size)])
        forms = {form: made for form, made in forms.items() if not few or form in FEW}
        seconds = {form: float("inf") for form in forms}
        for _ in range(rounds):
            # Several runs each, as one alone finds the caches full of another form's weights.
            for form, _ in itertools.product(forms, range(RUNS)):
                start = time.process_time()
                forms[form][0](case.images[:batch_size])
                seconds[form] = min(seconds[form], time.process_time() - start)
        classes = {
            form: torch.cat([run(batch).argmax(1) for batch in case.images.split(batch_size)])
            for form, (run, _) in forms.items()
        }
    right = expected if case.labels is None else case.labels
    rows = {
        form: {
            "milliseconds": 1e3 * seconds[form],
            "bytes": size,
            "right": float((classes[form] == right).float().mean()),
        }
        for form, (_, size) in forms.items()
    }
    return {"model": name, "labels": case.labels is not None, "forms": rows}


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=DEFAULT_MODELS, help="timm names")
    parser.add_argument("--images", type=int, default=320, help="a multiple of the batch sizes")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--few", action="store_true", help="float, ort and quantize_static with S8 weights alone")
    parser.add_argument("--output", type=Path, default=Path("bench_export.json"))
    arguments = parser.parse_args()
    if any(arguments.images % size for size in arguments.batch_size):
        parser.error(f"--images must be a multiple of --batch-size, got {arguments.images}, {arguments.batch_size}")
    results: list[dict[str, Any]] = []
    for name, size in itertools.product(arguments.models, arguments.batch_size):
        result = measure(name, arguments.images, size, arguments.rounds, few=arguments.few) | {"batch_size": size}
        print(f"{name}, {size} images, one thread:")
        what = "accuracy" if result["labels"] else "same class"
        for form, row in result["forms"].items():
            print(f"  {form:28} {row['milliseconds']:8.1f} ms {row['bytes'] / 1e6:7.2f} MB  {what} {row['right']:.1%}")
        results.append(result)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("models", "output")}
    document = {**settings, "bits": BITS, "results": results, "machine": platform.processor(), "threads": 1}
    arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
