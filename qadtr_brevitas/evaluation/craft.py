"""Make a patch for each precision and target class; finished patches are kept, so that a call can be repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model, PatchAttack, TargetedAttack
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.device import has_fast_bf16
from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.core.files import fingerprint_facts, fingerprint_tensors
from qadtr_brevitas.core.plugin import plugin_settings
from qadtr_brevitas.core.precision import PrecisionLike
from qadtr_brevitas.core.progress import Progress, part_of
from qadtr_brevitas.core.seeding import derive_seed, generator
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.metrics import Proportion, score
from qadtr_brevitas.evaluation.predict import predict
from qadtr_brevitas.quant import allowed_precisions, folded_norms, frozen_weights, precisions_or_all
from qadtr_brevitas.quant.inference import InferenceMode, check_differentiable, logits_at, parse_mode

DEFAULT_TARGETS = 3
MAX_TRAIN_IMAGES, MAX_HELD_OUT_IMAGES = 10_000, 1_000


@dataclass(frozen=True)
class CraftedPatch:
    """A finished patch.

    Args:
        path: the file.
        kind: attack and size, which the file name begins with.
        source: the inference mode that the patch was made on.
        target: the target class; None for an untargeted patch.
        held_out: ASR on the held-out images. The patch was chosen on them, so the value is optimistic.
        kept: whether the file existed before the call.
    """

    path: Path
    kind: str
    source: InferenceMode
    target: int | None
    held_out: Proportion
    kept: bool


@dataclass(frozen=True, kw_only=True)
class CraftSetup:
    """What patches are made on and with, for any attack.

    Args:
        train: images to make patches on.
        held_out: images to choose and to score patches on; disjoint from `train` and from the test split.
        output: folder of the patches.
        data: name and settings of the data set, which are stored with each patch.
        seed: the same seed makes the same patches, bit for bit on the same CPU.
        batch_size: images per forward pass when patches are scored.
        device: where to compute.
        float32: whether patches are made in float32 only. Otherwise the search at 32 bit runs in bfloat16 if the CPU is
            faster at that (`folded_norms`). Scores are computed in float32 in any case.
        progress: called after each optimizer step.
    """

    train: Split
    held_out: Split
    output: Path
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0
    batch_size: int = 256
    device: torch.device | str = "cpu"
    float32: bool = False
    progress: Progress | None = None


def divide_for_crafting(
    split: Split,
    *,
    seed: int,
    train: int | None = None,
    held_out: int | None = None,
    max_train: int = MAX_TRAIN_IMAGES,
    max_held_out: int = MAX_HELD_OUT_IMAGES,
) -> tuple[Split, Split]:
    """Divide training images into those that patches are made on and those that patches are chosen on.

    Both parts are class-balanced random draws. By default a fifth of the images is held out, and the rest is trained
    on, each up to a limit.

    Args:
        split: images of the training split.
        seed: decides which images are drawn.
        train: number of images to make patches on; None for the default.
        held_out: number of held-out images; None for the default.
        max_train: limit of the default of `train`.
        max_held_out: limit of the default of `held_out`.

    Returns:
        The images to make patches on, and the held-out images.

    Raises:
        UsageError: both parts together are larger than the split.
    """
    held_out = held_out or min(max_held_out, max(1, len(split) // 5))
    train = train or min(max_train, max(1, len(split) - held_out))
    if train + held_out > len(split):
        raise UsageError(
            f"{train} training images and {held_out} held-out images are more than the {len(split)} images of the "
            "training split: choose smaller numbers with --train-images and --held-out"
        )
    judge, rest = split.divide(held_out, seed=seed)
    return rest.balanced(train, seed=seed), judge


def craft(
    loaded: LoadedModel,
    attack: PatchAttack,
    setup: CraftSetup,
    *,
    name: str,
    precisions: Sequence[PrecisionLike | InferenceMode] | None = None,
    targets: Sequence[int | None] | None = None,
) -> list[CraftedPatch]:
    """Make the patches of every precision and target that are not in the folder yet.

    Args:
        loaded: the model to attack; it is moved to the device and put in eval mode.
        attack: a patch attack; its `target`, if it has one, is replaced.
        setup: images, folder, seed and device.
        name: registered name of the attack, which the file names begin with.
        precisions: the precisions to attack: `8+4+2` for the mean of the logits over several, `random(8+4+2)` for a
            precision that is drawn for each image of each step; None for all precisions of the model.
        targets: the target classes, None among them for an untargeted patch; None for the first three classes.

    Returns:
        All patches, in the order of precisions and then targets.

    Raises:
        UsageError: a precision that the model does not have, a mode without a gradient, a target that is out of range,
            a patch that does not fit on the images, or a file of the same name that was made from other inputs.
        DataError: the images are not of the size or the classes of the model, or the model classifies no held-out
            image correctly.
        CheckpointError: a patch cannot be written, or an existing one cannot be read.
    """
    train, held_out, progress = setup.train, setup.held_out, setup.progress
    loaded.check_data(train, data=setup.data.get("name", ""))
    sources = _sources(loaded, precisions)
    aims = _targets(attack, targets, train)
    images = fingerprint_tensors([train.images, train.labels, held_out.images, held_out.labels])
    work = [(source, _with_target(attack, target), target) for source in sources for target in aims]
    maker = _PatchMaker(loaded, name, setup, images)
    finished: list[CraftedPatch] = []
    loaded.model.to(setup.device).eval()
    with frozen_weights(loaded.model):
        for number, (source, targeted, target) in enumerate(work):
            part = part_of(progress, number, len(work), f"{source} bit, {_target_label(target)}")
            finished.append(maker.make(targeted, source, target, part))
            if progress:
                progress(number + 1, len(work), "")
    return finished


@dataclass(frozen=True)
class _PatchMaker:
    """Makes the patches of one call.

    Args:
        loaded: the model to attack, in eval mode and on the device.
        name: registered name of the attack.
        setup: images, folder, seed and device.
        images: fingerprint of the images of the setup.
    """

    loaded: LoadedModel
    name: str
    setup: CraftSetup
    images: str

    def make(
        self, attack: PatchAttack, source: InferenceMode, target: int | None, progress: Progress | None
    ) -> CraftedPatch:
        """Make and save one patch, or return the one that is in the folder already."""
        height, width = attack.mask(self.setup.train.image_size).shape
        kind = f"{self.name}-{height}x{width}"
        path = self.setup.output / f"{kind}-{_source_label(source)}-{_target_label(target)}.safetensors"
        made_of = self._made_of(attack, source)
        if path.exists():
            found = Patch.load(path)
            if found.meta.get("made_of") != made_of:
                raise UsageError(
                    f"{path} already exists and was made from another model, images, seed or settings: choose another "
                    "folder with --output, or move the file away"
                )
            return CraftedPatch(path, kind, source, target, Proportion(*found.meta["held_out"]), kept=True)
        patch, is_rounded, share = self._make(attack, source, target, progress)
        made = {"made_of": made_of, "bf16": is_rounded, "held_out": [share.count, share.n]}
        patch.with_meta(**self._origin(source), **made).save(path)
        return CraftedPatch(path, kind, source, target, share, kept=False)

    def _made_of(self, attack: PatchAttack, source: InferenceMode) -> str:
        """Return the fingerprint of everything the patch depends on."""
        settings = plugin_settings(attack)
        facts = [self.loaded.fingerprint, self.name, settings, str(source), self.images, self.setup.seed]
        return fingerprint_facts([*facts, "float32"] if self.setup.float32 else facts)

    def _make(
        self, attack: PatchAttack, source: InferenceMode, target: int | None, progress: Progress | None
    ) -> tuple[Patch, bool, Proportion]:
        """Return the patch, whether the search rounded to bfloat16, and the ASR on the held-out images."""
        model = self._model(source, target)
        first = self.setup.train.batch(torch.arange(min(2, len(self.setup.train))))[0].to(self.setup.device)
        bf16 = not self.setup.float32 and has_fast_bf16(self.setup.device)
        with folded_norms(self.loaded.model, first, bf16=bf16) as folding:
            patch = self._fit(model, attack, source, target, progress)
        is_rounded = any(map(folding.rounds, precisions_or_all(self.loaded.model, source.precisions)))
        return patch, is_rounded, self._score(model, patch, target)

    def _model(self, source: InferenceMode, target: int | None) -> Model:
        """Return the model that the attack searches and scores textures on.

        A random mode draws new precisions in every step of the search. Where textures are compared, which is without
        gradients, every forward pass draws the same precisions, so that no texture wins by luck.
        """
        stream = (self.setup.seed, "craft draws", str(source), _target_label(target))
        searched = logits_at(self.loaded.model, source, draws=generator(*stream))
        if not source.is_random:
            return searched

        def model(images: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return searched(images)
            return logits_at(self.loaded.model, source, draws=generator(*stream, "scores"))(images)

        return model

    def _fit(
        self, model: Model, attack: PatchAttack, source: InferenceMode, target: int | None, progress: Progress | None
    ) -> Patch:
        device = self.setup.device
        images, labels = (tensor.to(device) for tensor in (self.setup.train.images, self.setup.train.labels))
        judge = self.setup.held_out.images.to(device), self.setup.held_out.labels.to(device)
        # Each patch has a random stream of its own, or all would depend on the same start.
        seed = derive_seed(self.setup.seed, "craft", str(source), _target_label(target))
        try:
            return attack.fit(model, images, labels, held_out=judge, seed=seed, progress=progress)
        except DataError as error:
            raise DataError(f"{self.name} at {source} bit, {_target_label(target)}: {error}") from error

    def _score(self, model: Model, patch: Patch, target: int | None) -> Proportion:
        held_out, size, device = self.setup.held_out, self.setup.batch_size, self.setup.device
        clean = predict(model, held_out, batch_size=size, device=device)
        patched = predict(model, held_out, patch=patch, seed=self.setup.seed, batch_size=size, device=device)
        return score(clean, patched, held_out.labels, target=target).asr

    def _origin(self, source: InferenceMode) -> dict[str, Any]:
        return {
            "model": self.loaded.name,
            "fingerprint": self.loaded.fingerprint,
            "precision": str(source),
            "data": self.setup.data,
            "train_images": len(self.setup.train),
            "held_out_images": len(self.setup.held_out),
        }


def _sources(loaded: LoadedModel, precisions: Sequence[PrecisionLike | InferenceMode] | None) -> list[InferenceMode]:
    if precisions is None:
        return [InferenceMode((precision,)) for precision in allowed_precisions(loaded.model)]
    sources = list(dict.fromkeys(map(parse_mode, precisions)))
    for source in sources:
        check_differentiable(source)
    precisions_or_all(loaded.model, [precision for source in sources for precision in source.precisions])
    return sources


def _targets(attack: PatchAttack, targets: Sequence[int | None] | None, split: Split) -> list[int | None]:
    classes = len(split.classes)
    if not isinstance(attack, TargetedAttack):
        return [None]
    if targets is None:
        return list(range(min(DEFAULT_TARGETS, classes)))
    for target in targets:
        if target is not None and not 0 <= target < classes:
            raise UsageError(f"target class {target} is out of range: the data set has classes 0 to {classes - 1}")
    return list(dict.fromkeys(targets))


def _with_target(attack: PatchAttack, target: int | None) -> PatchAttack:
    return attack.with_settings(target=target) if isinstance(attack, TargetedAttack) else attack


def _target_label(target: int | None) -> str:
    return "untargeted" if target is None else f"target{target}"


def _source_label(source: InferenceMode) -> str:
    return str(source) + ("bit" if all(precision.is_tied for precision in source.precisions) else "")
