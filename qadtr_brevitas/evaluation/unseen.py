"""The unseen-patch protocol: a fixed set of patches that differ, each in one way, from those a defense trained on.

Defenses train on 8x8 squares at random places of 32x32 images, against the true class. What the paper calls unseen are
"different patch structures, scales, and quantization parameters" (section 4.2.2), which it does not list; here these
are, for a patch attack with a given budget of steps:

| name | differs in |
|---|---|
| `6x6`, `10x10`, `12x12` | size |
| `disc` | shape, at about the same number of pixels |
| `dpr` | shape, which is searched, at no more pixels |
| `other-target` | target classes |
| `gap` | family: made for turns, scales and shifts |
| `left-out-bits` | made at a bit-width that was left out of training |

Sizes are for images of 32 pixels and grow with the image. Each is reported by itself, and their mean.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import pi, sqrt
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter

from qadtr_brevitas.attacks.base import Attack, PatchAttack
from qadtr_brevitas.config.slots import Slot
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import plugin_settings
from qadtr_brevitas.core.precision import MAX_BITS, Precision, PrecisionLike
from qadtr_brevitas.core.progress import part_of
from qadtr_brevitas.core.registry import ATTACKS
from qadtr_brevitas.evaluation.craft import CraftedPatch, CraftSetup, craft
from qadtr_brevitas.evaluation.entries import LoadedModel, load_models
from qadtr_brevitas.pipeline.add_precision import add_precision
from qadtr_brevitas.quant import allowed_precisions
from qadtr_brevitas.quant.inference import InferenceMode

SIDE, SEEN_SIZE = 32, 8
SIZES = (6, 10, 12)
LEFT_OUT_BITS = (3, 6, 7, *range(9, MAX_BITS + 1), 4, 5, 8, 2)
"""Bit-widths in the order in which they are tried for one that was left out of training."""

_SHAPE = ("size", "area", "shape")
_FAMILY = {"lavan": "gap", "gap": "lavan", "dpr": "gap"}
_PATCH: TypeAdapter[PatchAttack] = TypeAdapter(Annotated[Any, Slot(ATTACKS)])


@dataclass(frozen=True)
class UnseenPatch:
    """One kind of patch of the protocol.

    Args:
        name: what tables call it.
        attack: the attack that makes it.
        other_targets: whether it aims at other classes than the attack it was derived from.
        left_out_bits: whether it is made at a bit-width that was left out of training.
    """

    name: str
    attack: PatchAttack
    other_targets: bool = False
    left_out_bits: bool = False


def unseen_patches(seen: Attack, image_side: int) -> list[UnseenPatch]:
    """Return the protocol, with the budget of a given attack.

    Args:
        seen: a universal patch attack: what it does not say about size and shape (steps, step rule...) is kept.
        image_side: height of the images in pixels.

    Raises:
        UsageError: the attack makes no universal patches, or is one that the protocol knows no other family for.
    """
    name = ATTACKS.name_of(type(seen))
    if name not in _FAMILY:
        given = name or type(seen).__name__
        raise UsageError(f"the unseen-patch protocol starts from one of {', '.join(_FAMILY)}, not from {given}")
    budget = _changed_fields(seen)

    def attack(kind: str, **fields: object) -> PatchAttack:
        known = ATTACKS.load(kind).__dataclass_fields__
        kept = {key: value for key, value in budget.items() if key in known}
        return _PATCH.validate_python({"name": kind, **kept, **fields})

    def scaled(size: int) -> int:
        return max(1, round(size * image_side / SIDE))

    square = {"size": scaled(SEEN_SIZE), "shape": "square"}
    diameter = round(scaled(SEEN_SIZE) * 2 / sqrt(pi))
    family = _FAMILY[name]
    return [
        *(UnseenPatch(f"{size}x{size}", attack(name, size=scaled(size), shape="square")) for size in SIZES),
        UnseenPatch("disc", attack(name, size=diameter, shape="disc")),
        UnseenPatch("dpr", attack("dpr", **square)),
        UnseenPatch("other-target", attack(name, **square), other_targets=True),
        UnseenPatch(family, attack(family, **square)),
        UnseenPatch("left-out-bits", attack(name, **square), left_out_bits=True),
    ]


def other_targets(targets: Sequence[int | None], classes: int) -> tuple[int | None, ...]:
    """Return as many classes as were aimed at, none of them among those; fewer where there are not so many.

    Raises:
        UsageError: every class was aimed at.
    """
    known = [target for target in targets if target is not None]
    others = tuple(number for number in range(classes) if number not in known)[: max(1, len(known))]
    if not others:
        raise UsageError(f"all {classes} classes are aimed at already: leave some for the patches with other targets")
    return others


def left_out_bits(trained: Collection[Precision]) -> Precision:
    """Return a bit-width that was left out of training: 3, or the next that is free.

    Raises:
        UsageError: the network was trained at every bit-width there is.
    """
    for bits in LEFT_OUT_BITS:
        if (precision := Precision(bits, bits)) not in trained:
            return precision
    raise UsageError("the network was trained at every bit-width: there is none that was left out")


def _changed_fields(attack: Attack) -> dict[str, Any]:
    """Return what the attack says that is not its default, but for size, shape and target."""
    own, defaults = plugin_settings(attack), plugin_settings(type(attack)())
    return {key: value for key, value in own.items() if value != defaults[key] and key not in (*_SHAPE, "target")}


WIDER_FOLDER = "left-out-bits"


def craft_unseen(
    loaded: LoadedModel,
    seen: PatchAttack,
    setup: CraftSetup,
    *,
    precisions: Sequence[PrecisionLike | InferenceMode] | None = None,
    targets: Sequence[int | None],
) -> list[CraftedPatch]:
    """Make the patches of the protocol that are not in the folder yet, all in one folder for `evaluate --patches`.

    The network at a bit-width that was left out of its training is kept beside them, in `left-out-bits/`.

    Args:
        loaded: the model to attack.
        seen: the patch attack that the protocol starts from; its settings are kept, but for what a kind differs in.
        setup: images, folder, seed and device.
        precisions: as of `craft`, for all kinds but the one that is made at the left-out bit-width.
        targets: classes that seen patches aim at; None among them for untargeted ones.

    Raises:
        UsageError: as of `craft` and `unseen_patches`, or the model is in memory only.
        DataError: the model is for other images or another number of classes.
        CheckpointError: a file cannot be written, or one that is there cannot be read.
    """
    if not loaded.path:
        raise UsageError(
            f"model {loaded.name} is in memory only, and the unseen-patch protocol converts it again with one more "
            "bit-width: save it with qadtr_brevitas.save(model, DIR) and give DIR"
        )
    made: list[CraftedPatch] = []
    kinds = unseen_patches(seen, setup.train.image_size[0])
    for number, kind in enumerate(kinds):
        victim = _at_left_out_bits(loaded, setup) if kind.left_out_bits else loaded
        made += craft(
            victim,
            kind.attack,
            replace(setup, progress=part_of(setup.progress, number, len(kinds), kind.name)),
            name=f"unseen-{kind.name}",
            precisions=[left_out_bits(allowed_precisions(loaded.model))] if kind.left_out_bits else precisions,
            targets=other_targets(targets, len(setup.train.classes)) if kind.other_targets else targets,
        )
    return made


def _at_left_out_bits(loaded: LoadedModel, setup: CraftSetup) -> LoadedModel:
    """Return the model at a bit-width it was not trained at, made or found."""
    precision = left_out_bits(allowed_precisions(loaded.model))
    folder = setup.output / WIDER_FOLDER / f"{loaded.fingerprint[:12]}-at-{precision}"
    if not folder.is_dir():
        images = setup.train.limited(512, seed=setup.seed)
        add_precision(Path(loaded.path), folder, precision, images, seed=setup.seed)
    return load_models([folder], device=setup.device)[0]
