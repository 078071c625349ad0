"""All that a network is deployed with, written beside its file: how to feed it, a runner without PyTorch, test vectors.

    model.onnx  README.md  labels.txt  preprocess.json  run.py  test_vectors.npz  export-report.json  [float.onnx]
    [masks.npz  defend.py]  [integers.py | quant_nodes.py]

The README and export-report.json say what was compared, in one plain sentence and in figures.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.files import write_json
from qadtr_brevitas.evaluation.defended_classifier import DefendedPrediction
from qadtr_brevitas.evaluation.predict import placements
from qadtr_brevitas.exporting.defense import MASKS_FILE
from qadtr_brevitas.exporting.formats import Format
from qadtr_brevitas.exporting.graph import library
from qadtr_brevitas.exporting.integer_file import INTEGERS_FILE, INTEGERS_RUNNER
from qadtr_brevitas.exporting.report import ExportReport
from qadtr_brevitas.exporting.rewrite import PIXELS
from qadtr_brevitas.quant.model_info import ModelInfo

FLOAT_FILE = "float.onnx"
README_FILE, LABELS_FILE, PREPROCESS_FILE = "README.md", "labels.txt", "preprocess.json"
RUNNER_FILE, VECTORS_FILE = "run.py", "test_vectors.npz"
_DEPLOYED = Path(__file__).parent / "deployed"
# What run.py imports for a runtime, and what has to be installed for it.
_HELPERS = {"integers": INTEGERS_RUNNER, "qonnx": "quant_nodes.py"}
_PACKAGES = {
    "onnxruntime": "numpy pillow onnxruntime",
    "qonnx": "numpy pillow onnx onnxruntime",
    "integers": "numpy pillow",
}


class Vectors:
    """Images, clean and with a patch, and the logits that PyTorch gives.

    Args:
        model: images (N, C, H, W) in [0, 1] to logits, at its precision.
        images: clean images.
        patches: names and patches, each of which is put on all images.
        as_bytes: round pixels to bytes, where the file takes nothing else.
        seed: seed of the patches' places.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        patches: Sequence[tuple[str, Patch]],
        *,
        as_bytes: bool,
        seed: int,
    ) -> None:
        height, width = images.shape[2:]
        parts = [images]
        for _, patch in patches:
            parts.append(patch.apply(images, corners=placements(patch, len(images), (height, width), seed=seed)))
        self.images = torch.cat(parts)
        if as_bytes:
            self.images = (self.images * PIXELS).round() / PIXELS
        self.names = [name for name in ("clean", *(name for name, _ in patches)) for _ in range(len(images))]
        with torch.no_grad():
            self.logits = model(self.images)
        self.defended: DefendedPrediction | None = None

    def save(self, path: Path) -> None:
        """Write them as arrays of numpy: images (N, C, H, W) in [0, 1], logits (N, classes), and what is on them.

        Where there is a defense, also its classes and which are certified, of the first images.
        """
        arrays: dict[str, Any] = {
            "images": self.images.numpy(),
            "logits": self.logits.numpy(),
            "patches": np.array(self.names, np.str_),
        }
        if self.defended is not None:
            arrays |= {"defended": self.defended.classes.numpy(), "certified": self.defended.certified.numpy()}
        np.savez_compressed(path, **arrays)


def write_bundle(
    folder: Path, info: ModelInfo, form: Format, report: ExportReport, vectors: Vectors, *, resize: int | None
) -> None:
    """Write all but the report into a folder with the model file and, for a compiler, what it builds with.

    Args:
        folder: the folder.
        info: what the model was made of.
        form: the format of the file.
        report: of the export.
        vectors: the test vectors.
        resize: pixels of the shorter side before pictures are cropped; None where their size fits.
    """
    shutil.copy(_DEPLOYED / RUNNER_FILE, folder / RUNNER_FILE)
    (folder / LABELS_FILE).write_text("".join(f"{name}\n" for name in info.classes), encoding="utf-8")
    vectors.save(folder / VECTORS_FILE)
    height, width = info.image_size
    files = {form.file: _file_facts(folder / form.file, form)}
    for name in filter(None, (_HELPERS.get(files[form.file]["runtime"]),)):
        shutil.copy(_DEPLOYED / name, folder / name)
    if (folder / FLOAT_FILE).is_file():
        files[FLOAT_FILE] = {**_file_facts(folder / FLOAT_FILE, None), "precision": "32"}
    settings = {
        "channels": len(info.mean),
        "height": height,
        "width": width,
        "resize_shorter": resize,
        "interpolation": "bicubic",
        "color": "RGB" if len(info.mean) == 3 else "gray" if len(info.mean) == 1 else "channels of the training data",
        "layout": "NCHW",
        "normalization": {"inside_the_file": True, "mean": list(info.mean), "std": list(info.std)},
        "batch": report.batch,
        "files": files,
    }
    write_json(folder / PREPROCESS_FILE, settings)
    own = folder / README_FILE
    # A compiler's folder has a text of its own on how to build it.
    building = own.read_text(encoding="utf-8") if own.is_file() else ""
    own.write_text("\n".join([*_readme(info, form, report, settings), building]).rstrip() + "\n", encoding="utf-8")


def _file_facts(path: Path, form: Format | None) -> dict[str, Any]:
    if path.name == INTEGERS_FILE:
        return {"input": "images", "output": "logits", "range": [0, int(PIXELS)], "runtime": "integers"}
    model: Any = library("onnx").load(str(path), load_external_data=False)
    is_standard = all(node.domain in ("", "ai.onnx", "com.microsoft") for node in model.graph.node)
    return {
        "input": model.graph.input[0].name,
        "output": model.graph.output[0].name,
        "range": [0, int(PIXELS)] if form is not None and form.takes_bytes else [0, 1],
        "opset": max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        "runtime": "onnxruntime" if is_standard else "qonnx",
    }


def _readme(info: ModelInfo, form: Format, report: ExportReport, settings: dict[str, Any]) -> Iterator[str]:
    facts = settings["files"][form.file]
    shape = f"({report.batch if report.batch != 'dynamic' else 'N'}, {len(info.mean)}, {settings['height']}, "
    shape += f"{settings['width']})"
    opset = f"ONNX opset {facts['opset']}; " if "opset" in facts else ""
    yield f"# {Path(report.model).name} at {report.precision} bit, as {form.name}\n"
    yield f"`{form.file}`: {form.help}. {opset}{report.bytes / 1e6:.3g} MB, of which the weights"
    yield f"take {report.weight_bytes / 1e6:.3g} MB at their bit-widths.\n"
    yield f"- In: `{facts['input']}`, float32 {shape}, {settings['color']}, channels first, values from "
    yield f"  {facts['range'][0]} to {facts['range'][1]}. The normalization of pixels is part of the file."
    yield f"- Out: `{facts['output']}`, float32 logits of {len(info.classes)} classes, in the order of `{LABELS_FILE}`."
    yield f"- Pictures: {_resizing(settings)}; `{PREPROCESS_FILE}` has it for programs."
    yield f"- Runs in: {form.runtimes}." + (f" {form.caution}\n" if form.caution else "\n")
    yield "```"
    yield f"pip install {_PACKAGES[facts['runtime']]}"
    yield f"python {RUNNER_FILE} --check               # the test vectors: {VECTORS_FILE}"
    yield f"python {RUNNER_FILE} picture.jpg           # its class"
    yield f"python {RUNNER_FILE} --images FOLDER       # accuracy on FOLDER/CLASS/*"
    if FLOAT_FILE in settings["files"]:
        yield f"python {RUNNER_FILE} --images FOLDER --model {FLOAT_FILE}   # the float network, to compare"
    if report.defense is not None:
        yield f"python {RUNNER_FILE} --defend picture.jpg  # its class under masks, and whether it is certified; also"
        yield "                                     # with --images and --check"
    yield "```\n"
    if report.defense is not None:
        yield f"{' '.join(report.defense.sentences())} The masks are those of `{MASKS_FILE}`.\n"
    yield from _compared(report)


def _resizing(settings: dict[str, Any]) -> str:
    size = f"{settings['height']}x{settings['width']}"
    if settings["resize_shorter"] is None:
        return f"{size} pixels; `{RUNNER_FILE}` resizes others and cuts out the center"
    return f"resize the shorter side to {settings['resize_shorter']} pixels (bicubic) and cut out {size} in the center"


def _compared(report: ExportReport) -> Iterator[str]:
    found = report.agreement
    if report.unchecked:
        yield f"The file was {report.unchecked}.\n"
    if found is None:
        yield "The file was not compared with PyTorch.\n"
        return
    yield f"{found.sentence()}\n"
    yield f"| on {found.images} test images | PyTorch (%) | this file (%) |"
    yield "|---|---|---|"
    yield f"| accuracy | {100 * found.accuracy:.1f} | {100 * found.exported_accuracy:.1f} |"
    if report.baseline is not None:
        yield f"| accuracy of the float file | | {100 * report.baseline:.1f} |"
    for patch in found.patches:
        yield f"| success of {patch.name} | {100 * patch.asr:.1f} | {100 * patch.exported_asr:.1f} |"
    yield ""
