"""Choose what the pictures of a report show, and draws them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qadtr_brevitas.attacks.drawing import as_rgb, as_rgba
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel, NamedPatch
from qadtr_brevitas.evaluation.predict import placements
from qadtr_brevitas.evaluation.report import EvaluationReport
from qadtr_brevitas.evaluation.report.certified_plot import draw_certified
from qadtr_brevitas.evaluation.report.plots import ImageGrid, Tile, draw_asr, draw_patches, draw_sheet
from qadtr_brevitas.evaluation.report.views import families
from qadtr_brevitas.quant import at_precision, frozen_weights

_IMAGES = 6
# Images of a class among which one is looked for that is classified correctly.
_TRIED = 8
_PATCHES = 120


def draw_pictures(
    report: EvaluationReport,
    loaded_models: Sequence[LoadedModel],
    patches: Sequence[NamedPatch],
    split: Split,
    *,
    folder: Path,
    device: torch.device | str = "cpu",
) -> list[Path]:
    """Draw asr.png, certified.png and, of patches, patches.png and for each model with own patches examples-MODEL.png.

    Args:
        report: the finished evaluation of these models and patches.
        loaded_models: its models.
        patches: its patches as they were made, without the controls.
        split: its images.
        folder: where to.
        device: where the models are.

    Returns:
        The files written; none without patches, attacks and certificates.

    Raises:
        CheckpointError: a file cannot be written.
    """
    drawn = [draw_asr(report, folder / "asr.png")] if families(report) else []
    drawn += [draw_certified(report, folder / "certified.png")] if report.certified else []
    if not patches:
        return drawn
    textures = {c.name: as_rgba(c.patch.texture, c.patch.mask) for c in patches[:_PATCHES]}
    drawn.append(draw_patches(report, textures, folder / "patches.png"))
    for loaded in loaded_models:
        own = _own_patches(report, loaded, patches)
        if own:
            sheet = _examples(report, loaded, own, split, device)
            drawn.append(draw_sheet(sheet, folder / f"examples-{loaded.name.replace('/', '-')}.png"))
    return drawn


def _own_patches(
    report: EvaluationReport, loaded: LoadedModel, patches: Sequence[NamedPatch]
) -> dict[Precision, NamedPatch]:
    """Return the first white-box patch at each precision, all of one family and, if possible, one target."""
    own: dict[Precision, NamedPatch] = {}
    by_name = {patch_entry.name: patch_entry for patch_entry in patches}
    for cell in report.cells:
        if cell.model == loaded.name and cell.threat == "white-box" and cell.attack in by_name:
            own.setdefault(Precision.parse(cell.precision), by_name[cell.attack])
    return own


def _examples(
    report: EvaluationReport,
    loaded: LoadedModel,
    own: dict[Precision, NamedPatch],
    split: Split,
    device: torch.device | str,
) -> ImageGrid:
    """Return images without and with each patch."""
    targets = {patch_entry.facts.target for patch_entry in own.values()}
    with at_precision(loaded.model, next(iter(own))):
        indices = _shown_images(loaded, split, targets, device)
    images, labels = split.batch(indices, device=device)
    rows: list[list[Tile]] = [[] for _ in indices]
    titles: list[str] = []
    with torch.no_grad(), frozen_weights(loaded.model):
        for precision, patch_entry in own.items():
            with at_precision(loaded.model, precision):
                if not titles:
                    titles.append(f"clean\nat {precision} bit")
                    _add(rows, images, loaded.model(images).argmax(1), labels, None, split)
                corners = placements(patch_entry.patch, len(split), split.image_size, seed=report.seed)[indices]
                patched = patch_entry.patch.to(device).apply(images, corners=corners.to(device))
                _add(rows, patched, loaded.model(patched).argmax(1), labels, patch_entry.facts.target, split)
                titles.append(f"patched\nat {precision} bit")
    aims = ", ".join(sorted(split.classes[target] for target in targets if target is not None))
    return ImageGrid(
        title=f"{loaded.name}: white-box patches" + (f" that aim at {aims}" if aims else ""),
        columns=tuple(titles),
        rows=tuple((split.classes[int(label)], tuple(tiles)) for label, tiles in zip(labels, rows, strict=True)),
        note="Below each image: predicted class. Green: right; red: the target; orange: another wrong class. "
        "Each is the first of its class that is classified correctly without a patch, if one of the first few is.",
    )


def _shown_images(loaded: LoadedModel, split: Split, targets: set[int | None], device: torch.device | str) -> Tensor:
    """Return the indices of an image of each of the first classes: as in ASR, one that the clean model gets right."""
    classes = [label for label in range(len(split.classes)) if label not in targets]
    first = [(split.labels == label).nonzero().flatten()[:_TRIED] for label in classes]
    first = [indices for indices in first if len(indices)][:_IMAGES]
    shown: list[Tensor] = []
    with torch.no_grad():
        for indices in first:
            images, labels = split.batch(indices, device=device)
            right = loaded.model(images).argmax(1) == labels
            shown.append(indices[int(right.int().argmax())])
    return torch.stack(shown)


def _add(
    rows: list[list[Tile]], images: Tensor, predicted: Tensor, labels: Tensor, target: int | None, split: Split
) -> None:
    for row, image, guess, label in zip(rows, images, predicted.tolist(), labels.tolist(), strict=True):
        verdict = "right" if guess == label else "target" if guess == target else "wrong"
        row.append(Tile(as_rgb(image), split.classes[guess], verdict))
