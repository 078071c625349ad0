"""Makes one patch for each precision, or mean over precisions, and target; finished patches are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model, TargetedAttack
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


"""Is told optimizer steps done, all of them, and what is being made."""


@dataclass(frozen=True)
class Crafted:
    """One finished patch.

    Args:
        path: its file.
        kind: attack and size.
        source: the precision it was made at, or several together.
        target: class it aims at; None for an untargeted one.
        held_out: its ASR on the held-out images. They chose the patch, so this is a first look and no result.
        kept: True if it was there already.
    """

    path: Path
    kind: str
    source: InferenceMode
    target: int | None
    held_out: Proportion
    kept: bool


@dataclass(frozen=True, kw_only=True)
class CraftSetup:
    """What patches are made on and with, whatever the attack.

    Args:
        train: images to make patches on.
        held_out: images to choose and to score them on; none of `train`, and none of the test split.
        output: folder for the patches.
        data: name and settings of the data set, kept with each patch.
        seed: the same seed gives the same patches, bit for bit on the same CPU.
        batch_size: images in one forward pass of the held-out score.
        device: where to compute.
        float32: make patches in float32 alone; otherwise at 32 bit in bfloat16, where the CPU is faster at that
            (`folded_norms`). They are scored in float32 in any case.
        progress: told after each optimizer step.
    """

    train: Split
    held_out: Split
    output: Path
    data: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch_size: int = 256
    device: torch.device | str = "cpu"
    float32: bool = False
    progress: Progress | None = None


def craft(
    loaded: LoadedModel,
    attack: Any,
    setup: CraftSetup,
    *,
    name: str,
    precisions: Sequence[PrecisionLike | InferenceMode] | None = None,
    targets: Sequence[int | None] | None = None,
) -> list[Crafted]:
    """Make the patches of every precision and target that are not in the folder yet.

    Args:
        loaded: the model to attack; moved to the device and put in eval mode.
        attack: a patch attack plug-in; its `target`, if it has one, is replaced.
        setup: images, folder, seed and device.
        name: registered name of the attack, which starts the file names.
        precisions: precisions to attack, `8+4+2` for the mean of the logits over several, `random(8+4+2)` for one drawn
            anew for each image of each step; None for each that the model allows.
        targets: classes to aim at, None among them for an untargeted patch; None for the first three.

    Raises:
        UsageError: a precision the model does not allow, a vote, a target that is no class, a patch that does not fit
            on the images, or a file of the same name that was made otherwise.
        DataError: the model is for other images or another number of classes, or classifies none correctly.
        CheckpointError: a patch cannot be written, or one that is there cannot be read.
    """
    train, held_out, progress = setup.train, setup.held_out, setup.progress
    loaded.check_data(train, data=setup.data.get("name", ""))
    sources = _sources(loaded, precisions)
    aims = _targets(attack, targets, train)
    images = fingerprint_tensors([train.images, train.labels, held_out.images, held_out.labels])
    work = [(source, _aimed(attack, target), target) for source in sources for target in aims]
    maker = _PatchMaker(loaded, name, setup, images)
    finished: list[Crafted] = []
    loaded.model.to(setup.device).eval()
    with frozen_weights(loaded.model):
        for number, (source, aimed, target) in enumerate(work):
            bar = part_of(progress, number, len(work), f"{source} bit, {_aim(target)}")
            finished.append(maker.make(aimed, source, target, bar))
            if progress:
                progress(number + 1, len(work), "")
    return finished


@dataclass(frozen=True)
class _PatchMaker:
    """Makes the patches of one call; `images` is the fingerprint of those of the setup."""

    loaded: LoadedModel
    name: str
    setup: CraftSetup
    images: str

    def make(self, attack: Any, source: InferenceMode, target: int | None, bar: Progress | None) -> Crafted:
        """One patch, made or found."""
        height, width = attack.mask(self.setup.train.image_size).shape
        kind = f"{self.name}-{height}x{width}"
        path = self.setup.output / f"{kind}-{_bits(source)}-{_aim(target)}.safetensors"
        facts = [self.loaded.fingerprint, self.name, plugin_settings(attack), str(source), self.images, self.setup.seed]
        made_of = fingerprint_facts([*facts, "float32"] if self.setup.float32 else facts)
        if path.exists():
            found = Patch.load(path)
            if found.meta.get("made_of") != made_of:
                raise UsageError(
                    f"{path} is there already, made from another model, images, seed or settings: "
                    "choose another folder with --output, or move it away"
                )
            return Crafted(path, kind, source, target, Proportion(*found.meta["held_out"]), kept=True)
        model = self._model(source, target)
        few = self.setup.train.batch(torch.arange(min(2, len(self.setup.train))))[0].to(self.setup.device)
        bf16 = not self.setup.float32 and has_fast_bf16(self.setup.device)
        with folded_norms(self.loaded.model, few, bf16=bf16) as folding:
            patch = self._fit(model, attack, source, target, bar)
        rounded = any(map(folding.rounds, precisions_or_all(self.loaded.model, source.precisions)))
        share = self._score(model, patch, target)
        made = {"made_of": made_of, "bf16": rounded, "held_out": [share.count, share.n]}
        patch.with_meta(**self._source(source), **made).save(path)
        return Crafted(path, kind, source, target, share, kept=False)

    def _model(self, source: InferenceMode, target: int | None) -> Model:
        """Return what the attack sees; a random one draws alike each time that textures are compared."""
        stream = (self.setup.seed, "craft draws", str(source), _aim(target))
        searched = logits_at(self.loaded.model, source, draws=generator(*stream))
        if not source.is_random:
            return searched

        def model(images: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return searched(images)
            return logits_at(self.loaded.model, source, draws=generator(*stream, "scores"))(images)

        return model

    def _fit(self, model: Model, attack: Any, source: InferenceMode, target: int | None, bar: Progress | None) -> Patch:
        device = self.setup.device
        images, labels = (tensor.to(device) for tensor in (self.setup.train.images, self.setup.train.labels))
        judge = self.setup.held_out.images.to(device), self.setup.held_out.labels.to(device)
        # A stream for each patch: they must not share the luck of one start.
        seed = derive_seed(self.setup.seed, "craft", str(source), _aim(target))
        try:
            return attack.fit(model, images, labels, held_out=judge, seed=seed, progress=bar)
        except DataError as error:
            raise DataError(f"{self.name} at {source} bit, {_aim(target)}: {error}") from error

    def _score(self, model: Model, patch: Patch, target: int | None) -> Proportion:
        held_out, size, device = self.setup.held_out, self.setup.batch_size, self.setup.device
        clean = predict(model, held_out, batch_size=size, device=device)
        patched = predict(model, held_out, patch=patch, seed=self.setup.seed, batch_size=size, device=device)
        return score(clean, patched, held_out.labels, target=target).asr

    def _source(self, source: InferenceMode) -> dict[str, Any]:
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


def _targets(attack: Any, targets: Sequence[int | None] | None, split: Split) -> list[int | None]:
    classes = len(split.classes)
    if not isinstance(attack, TargetedAttack):
        return [None]
    if targets is None:
        return list(range(min(DEFAULT_TARGETS, classes)))
    for target in targets:
        if target is not None and not 0 <= target < classes:
            raise UsageError(f"target {target} is no class of the data set: give 0 to {classes - 1}")
    return list(dict.fromkeys(targets))


def _aimed(attack: Any, target: int | None) -> Any:
    return attack.with_settings(target=target) if isinstance(attack, TargetedAttack) else attack


def _aim(target: int | None) -> str:
    return "untargeted" if target is None else f"target{target}"


def _bits(source: InferenceMode) -> str:
    return str(source) + ("bit" if all(precision.is_tied for precision in source.precisions) else "")
