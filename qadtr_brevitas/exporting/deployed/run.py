"""Run the network of this folder on pictures, without PyTorch.

python run.py cat.jpg dog.png       # their classes
python run.py --images FOLDER       # accuracy on FOLDER/CLASS/*, with the names of labels.txt
python run.py --check               # the test vectors that came with the network
python run.py --defend cat.jpg      # the class under masks, where the folder has them, and whether it is certified

It needs numpy and pillow, and mostly onnxruntime, as README.md says.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import numpy as np
    from PIL import Image
except ImportError as missing:
    sys.exit(f"{missing}: pip install numpy pillow, and what else README.md says")

FOLDER = Path(__file__).resolve().parent
SUFFIXES = set(Image.registered_extensions())
BATCH = 32
# Shares of the largest logit by which other processors may differ in the median image.
TOLERANCE = 0.02


def main() -> int:
    """Read the arguments and do what they ask for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", type=Path, help="pictures to classify")
    parser.add_argument("--images", type=Path, help="folder of one folder of pictures for each class")
    parser.add_argument("--check", action="store_true", help="run the test vectors")
    parser.add_argument("--defend", action="store_true", help="answer through the masks of masks.npz")
    parser.add_argument("--model", help="file of this folder  [default: the exported one]")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args()
    if not (given.pictures or given.images or given.check):
        parser.error("give pictures, --images FOLDER or --check")
    settings = json.loads((FOLDER / "preprocess.json").read_text(encoding="utf-8"))
    given.model = given.model or next(iter(settings["files"]))
    if given.model not in settings["files"]:
        parser.error(f"--model is {given.model!r}: this folder has {', '.join(settings['files'])}")
    network = Network(FOLDER / given.model, settings, settings["files"][given.model])
    if given.defend and not (FOLDER / "masks.npz").is_file():
        parser.error("--defend: this folder has no masks.npz; export again with --defend SIZE")
    if given.defend:
        return defended(network, given)
    if given.check:
        return check(network, as_json=given.json)
    if given.images:
        return measure(network, given.images, as_json=given.json)
    for picture, logits in zip(given.pictures, network.logits(list(given.pictures)), strict=True):
        order = np.argsort(-logits)[:3]
        print(f"{picture}: " + ", ".join(f"{network.labels[i]} ({logits[i]:.3g})" for i in order))
    return 0


class Network:
    """A file with what it needs to read pictures."""

    def __init__(self, path: Path, settings: dict[str, Any], own: dict[str, Any]) -> None:
        self.settings, self.own = settings, own
        self.labels = (FOLDER / "labels.txt").read_text(encoding="utf-8").splitlines()
        self._run = {"onnxruntime": _onnxruntime, "integers": _integers}.get(own["runtime"], _qonnx)(path)

    def logits(self, pictures: list[Path]) -> Any:
        """Return the logits of picture files, (n, classes)."""
        parts = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
        return np.concatenate([self.run(np.stack([self.read(path) for path in part])) for part in parts])

    def read(self, path: Path) -> Any:
        """Return a picture as the file takes it, (C, H, W)."""
        with Image.open(path) as file:
            image = self._fitted(_eight_bit(file).convert("RGB"), path)
        pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32)
        if self.settings["channels"] == 1:
            # As the network does itself where it is given colors.
            pixels = (pixels / 255).mean(0, keepdims=True, dtype=np.float32) * 255
            pixels = pixels.round() if self.own["range"] == [0, 255] else pixels
        return pixels if self.own["range"] == [0, 255] else pixels / np.float32(255)

    def as_taken(self, images: Any) -> Any:
        """Return images of [0, 1] as the file takes them."""
        return ((images * 255).round() if self.own["range"] == [0, 255] else images).astype(np.float32)

    def run(self, images: Any) -> Any:
        """Return the logits of images as the file takes them, (n, C, H, W), in batches of the size that it takes."""
        size = self.settings["batch"]
        if size == "dynamic":
            return self._run(images)
        found: list[Any] = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            filled = np.concatenate([batch, *[batch[-1:]] * (size - len(batch))])
            found.append(self._run(filled)[: len(batch)])
        return np.concatenate(found)

    def _fitted(self, image: Image.Image, path: Path) -> Image.Image:
        """Resize the shorter side and cut out the center, as the images were that the accuracy was measured on."""
        height, width, shorter = (self.settings[key] for key in ("height", "width", "resize_shorter"))
        if shorter is None:
            if image.size == (width, height):
                return image
            if height != width:
                sys.exit(f"{path} is {image.height}x{image.width}: the network takes {height}x{width}, resize it first")
            shorter = height
        smallest = min(image.size)
        if smallest != shorter:
            image = image.resize(
                (image.width * shorter // smallest, image.height * shorter // smallest), Image.Resampling.BICUBIC
            )
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return the upper byte of grays of 16 bit."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def _onnxruntime(path: Path) -> Callable[[Any], Any]:
    return _session(str(path))


def _qonnx(path: Path) -> Callable[[Any], Any]:
    """Run a file with Quant nodes, which onnxruntime does not know, as the standard operators that they stand for."""
    from quant_nodes import load_standard  # pyright: ignore[reportMissingImports]

    return _session(load_standard(path).SerializeToString())  # pyright: ignore[reportUnknownMemberType]


def session_options() -> Any:
    """Return options of onnxruntime with which signed weights of 8 bit are multiplied exactly on every processor.

    On x86 without VNNI onnxruntime adds two products in 16 bit, which saturate, unless it is told to take longer.
    """
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options: Any = onnxruntime.SessionOptions()
    if not adds_exactly():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def adds_exactly() -> bool:
    """Return whether this processor is known to add products of bytes without saturating at 16 bit."""
    if platform.machine().lower() not in ("x86_64", "amd64", "x86", "i386", "i686"):
        return True
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(told)


def _session(model: str | bytes) -> Callable[[Any], Any]:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session: Any = onnxruntime.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _integers(path: Path) -> Callable[[Any], Any]:
    from integers import IntegerNetwork  # pyright: ignore[reportMissingImports]

    return IntegerNetwork(path).run  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]


def measure(network: Network, folder: Path, *, as_json: bool) -> int:
    """Print the accuracy on pictures in one folder for each class."""
    found = list(_labeled(network.labels, folder))
    logits = network.logits([path for path, _ in found])
    right = sum(int(one.argmax()) == label for one, (_, label) in zip(logits, found, strict=True))
    text = f"{100 * right / len(found):.1f} % of {len(found)} pictures are classified correctly ({right})"
    print(json.dumps({"images": len(found), "correct": right, "accuracy": right / len(found)}) if as_json else text)
    return 0


def defended(network: Network, given: argparse.Namespace) -> int:
    """Do what is asked for with answers through masks; return the exit code."""
    from defend import Answer, Defense  # pyright: ignore[reportMissingImports]

    defense = Defense(network.run, FOLDER / "masks.npz")
    if given.check:
        vectors = np.load(FOLDER / "test_vectors.npz")
        expected = list(zip(vectors["defended"].tolist(), vectors["certified"].tolist(), strict=True))
        images = vectors["images"][: len(expected)]
        answers: list[Answer] = [defense(one) for one in network.as_taken(images)]
        same = sum((one.label, one.certified) == right for one, right in zip(answers, expected, strict=True))
        print(f"{same} of {len(expected)} test vectors get the expected class under masks, certified as expected")
        return int(same < len(expected))
    found = list(_labeled(network.labels, given.images)) if given.images else [(path, -1) for path in given.pictures]
    answers = []
    for path, _ in found:
        answers.append(defense(network.read(path)))
        if not given.images:
            word = "certified" if answers[-1].certified else "not certified"
            print(f"{path}: {network.labels[answers[-1].label]}, {word}, {answers[-1].passes} passes")
    if given.images:
        right = [one.label == label for one, (_, label) in zip(answers, found, strict=True)]
        proved = sum(one.certified and ok for one, ok in zip(answers, right, strict=True))
        facts = {"images": len(found), "correct": sum(right), "certified": proved}
        facts |= {"passes": sum(one.passes for one in answers) / len(found)}
        text = f"of {len(found)} pictures {sum(right)} are classified correctly under masks, {proved} of them certified"
        print(json.dumps(facts) if given.json else text)
    return 0


def _labeled(labels: list[str], folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield pictures with the number of their class."""
    known = {unicodedata.normalize("NFC", label): number for number, label in enumerate(labels)}
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    strange = [path.name for path in classes if unicodedata.normalize("NFC", path.name) not in known]
    if strange or not classes:
        sys.exit(f"{folder} must hold one folder for each class, called as in labels.txt; {strange[:3]} is no class")
    pictures = [
        (path, known[unicodedata.normalize("NFC", place.name)])
        for place in classes
        for path in sorted(place.rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not pictures:
        sys.exit(f"there are no pictures in {folder}")
    yield from pictures


def check(network: Network, *, as_json: bool) -> int:
    """Run the test vectors, and return 1 where the classes are others or most logits are."""
    vectors = np.load(FOLDER / "test_vectors.npz")
    images, expected = vectors["images"], vectors["logits"]
    found = network.run(network.as_taken(images))
    distance = np.abs(found - expected).max(1)
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    largest = float(np.abs(expected).max())
    result = {"images": len(images), "same_class": same, "max_difference": float(distance.max()), "largest": largest}
    print(
        json.dumps(result)
        if as_json
        else f"{same} of {len(images)} test vectors get the expected class; the largest logit difference is "
        f"{distance.max():.2g} of {largest:.3g}"
    )
    return int(same < len(images) or float(np.median(distance)) > TOLERANCE * largest)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ImportError as missing:
        sys.exit(f"{missing}: pip install what README.md names")
