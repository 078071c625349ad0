"""Makes the patches of the unseen-patch protocol for one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qadtr_brevitas.craft import Crafted, Progress, craft
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.precision import PrecisionLike
from qadtr_brevitas.protocol import UnseenPatch, left_out_bits, other_targets, unseen_patches
from qadtr_brevitas.quant import allowed_precisions
from qadtr_brevitas.sources import Access
from qadtr_brevitas.subjects import Subject, load_subjects
from qadtr_brevitas.widen import widen

WIDER_FOLDER = "left-out-bits"


def craft_unseen(
    subject: Subject,
    seen: Any,
    *,
    train: Split,
    held_out: Split,
    output: Path,
    precisions: Sequence[PrecisionLike | Access] | None = None,
    targets: Sequence[int | None],
    data: dict[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[Crafted]:
    """Makes the patches of the protocol that are not in the folder yet, all in one folder for `evaluate --patches`.

    The network at a bit-width that was left out of its training is kept beside them, in `left-out-bits/`.

    Args:
        subject: the model to attack.
        seen: the patch attack that the protocol starts from; its settings are kept, but for what a kind differs in.
        train: images to make patches on.
        held_out: images to choose and to score them on.
        output: folder for the patches.
        precisions: as of `craft`, for all kinds but the one that is made at the left-out bit-width.
        targets: classes that seen patches aim at; None among them for untargeted ones.
        data: as of `craft`.
        seed: the same seed gives the same patches.
        batch_size: images in one forward pass of the held-out score.
        device: where to compute.
        progress: told after each optimizer step.

    Raises:
        UsageError: as of `craft` and `unseen_patches`.
        DataError: the model is for other images or another number of classes.
        CheckpointError: a file cannot be written, or one that is there cannot be read.
    """
    made: list[Crafted] = []
    kinds = unseen_patches(seen, train.image_size[0])
    for number, kind in enumerate(kinds):
        victim = _at_left_out_bits(subject, train, output, seed, device) if kind.left_out_bits else subject
        made += craft(
            victim,
            kind.attack,
            name=f"unseen-{kind.name}",
            train=train,
            held_out=held_out,
            output=output,
            precisions=[left_out_bits(allowed_precisions(subject.model))] if kind.left_out_bits else precisions,
            targets=other_targets(targets, len(train.classes)) if kind.other_targets else targets,
            data=data,
            seed=seed,
            batch_size=batch_size,
            device=device,
            progress=progress and _of_all(progress, kind, number, len(kinds)),
        )
    return made


def _at_left_out_bits(subject: Subject, images: Split, output: Path, seed: int, device: torch.device | str) -> Subject:
    """The model at a bit-width it was not trained at, made or found."""
    precision = left_out_bits(allowed_precisions(subject.model))
    folder = output / WIDER_FOLDER / f"{subject.fingerprint[:12]}-at-{precision}"
    if not folder.is_dir():
        widen(Path(subject.path), folder, precision, images.limited(512, seed=seed), seed=seed)
    return load_subjects([folder], device=device)[0]


def _of_all(progress: Progress, kind: UnseenPatch, number: int, kinds: int) -> Progress:
    """Progress of one kind as a share of all of them."""
    return lambda done, total, note: progress(number * total + done, kinds * total, f"{kind.name} {note}".rstrip())
