"""Makes the patches of the unseen-patch protocol for one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qadtr_brevitas.craft import Crafted, CraftSetup, Progress, craft
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
    setup: CraftSetup,
    *,
    precisions: Sequence[PrecisionLike | Access] | None = None,
    targets: Sequence[int | None],
) -> list[Crafted]:
    """Makes the patches of the protocol that are not in the folder yet, all in one folder for `evaluate --patches`.

    The network at a bit-width that was left out of its training is kept beside them, in `left-out-bits/`.

    Args:
        subject: the model to attack.
        seen: the patch attack that the protocol starts from; its settings are kept, but for what a kind differs in.
        setup: images, folder, seed and device.
        precisions: as of `craft`, for all kinds but the one that is made at the left-out bit-width.
        targets: classes that seen patches aim at; None among them for untargeted ones.

    Raises:
        UsageError: as of `craft` and `unseen_patches`.
        DataError: the model is for other images or another number of classes.
        CheckpointError: a file cannot be written, or one that is there cannot be read.
    """
    made: list[Crafted] = []
    kinds = unseen_patches(seen, setup.train.image_size[0])
    for number, kind in enumerate(kinds):
        victim = _at_left_out_bits(subject, setup) if kind.left_out_bits else subject
        made += craft(
            victim,
            kind.attack,
            replace(setup, progress=setup.progress and _of_all(setup.progress, kind, number, len(kinds))),
            name=f"unseen-{kind.name}",
            precisions=[left_out_bits(allowed_precisions(subject.model))] if kind.left_out_bits else precisions,
            targets=other_targets(targets, len(setup.train.classes)) if kind.other_targets else targets,
        )
    return made


def _at_left_out_bits(subject: Subject, setup: CraftSetup) -> Subject:
    """The model at a bit-width it was not trained at, made or found."""
    precision = left_out_bits(allowed_precisions(subject.model))
    folder = setup.output / WIDER_FOLDER / f"{subject.fingerprint[:12]}-at-{precision}"
    if not folder.is_dir():
        images = setup.train.limited(512, seed=setup.seed)
        widen(Path(subject.path), folder, precision, images, seed=setup.seed)
    return load_subjects([folder], device=setup.device)[0]


def _of_all(progress: Progress, kind: UnseenPatch, number: int, kinds: int) -> Progress:
    """Progress of one kind as a share of all of them."""
    return lambda done, total, note: progress(number * total + done, kinds * total, f"{kind.name} {note}".rstrip())
