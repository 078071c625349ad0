"""The units of work of an evaluation: each computes one cell and leaves it in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.cells import DEFAULT_BATCH_SIZE, CellKey, CellStore, ChunkKey
from qadtr_brevitas.evaluation.entries import LoadedModel, NamedPatch
from qadtr_brevitas.evaluation.image_attacks import SourcedAttack
from qadtr_brevitas.evaluation.predict import predict
from qadtr_brevitas.evaluation.report.layout import bits
from qadtr_brevitas.quant import frozen_weights
from qadtr_brevitas.quant.inference import InferenceMode, logits_at

_PICTURES = 256
"""Images of the split that attacks may start from, as many of each class."""


@dataclass(frozen=True)
class Victim:
    """A model at a precision, or at several together, as it is scored."""

    loaded: LoadedModel
    precision: InferenceMode

    @property
    def name(self) -> str:
        """What a cell calls it: content, not the name of a folder."""
        return f"{self.loaded.fingerprint}@{self.precision}"

    def logits(self, seed: int, *keys: int | str) -> Callable[[Tensor], Tensor]:
        """Return the model as it answers; random precisions depend on the seed and on what the forwards are for."""
        draws = generator(seed, "inference", *keys) if self.precision.is_random else None
        return logits_at(self.loaded.model, self.precision, draws=draws)

    def __str__(self) -> str:
        return f"{self.loaded.name} at {bits(str(self.precision))}"


@dataclass(frozen=True)
class EvaluationInputs:
    """What all jobs of an evaluation share.

    Args:
        split: the images.
        data: their fingerprint.
        seed: of placements and attacks.
        batch_size: images in one forward pass, and in one chunk of a per-image attack.
    """

    split: Split
    data: str
    seed: int
    batch_size: int


class Job(Protocol):
    """One cell."""

    def __str__(self) -> str:
        """Return what it is, for progress."""
        ...

    def loaded_models(self) -> Sequence[LoadedModel]:
        """Return the models it needs."""
        ...

    def is_done(self, store: CellStore) -> bool:
        """Return True where the store has the cell."""
        ...

    def compute(self, store: CellStore, device: torch.device) -> None:
        """Compute the cell and keep it; its models are frozen, in eval mode and on the device."""
        ...


@dataclass(frozen=True)
class PatchJob:
    """The predictions of one victim on all images, with a patch or (None) without."""

    inputs: EvaluationInputs
    victim: Victim
    patch_entry: NamedPatch | None

    def __str__(self) -> str:
        return f"{self.victim}, {self.patch_entry.name if self.patch_entry else 'clean'}"

    @property
    def key(self) -> CellKey:
        """What its predictions depend on."""
        where = self.victim.loaded.fingerprint, str(self.victim.precision), self.inputs.data
        images = len(self.inputs.split)
        size = min(self.inputs.batch_size, images)
        size = None if size == min(DEFAULT_BATCH_SIZE, images) else size
        if self.patch_entry is None:
            seed = self.inputs.seed if self.victim.precision.is_random else None
            return CellKey(*where, seed=seed, batch_size=size)
        return CellKey(*where, self.patch_entry.facts.fingerprint, self.inputs.seed, size)

    def loaded_models(self) -> Sequence[LoadedModel]:
        """Return the model attacked."""
        return [self.victim.loaded]

    def is_done(self, store: CellStore) -> bool:
        """Return True where the store has the predictions."""
        return store.read(self.key, images=len(self.inputs.split)) is not None

    def compute(self, store: CellStore, device: torch.device) -> None:
        """Compute the predictions and keep them."""
        predictions = predict(
            self.victim.logits(self.inputs.seed, self.patch_entry.facts.fingerprint if self.patch_entry else "clean"),
            self.inputs.split,
            patch=self.patch_entry.patch if self.patch_entry else None,
            seed=self.inputs.seed,
            batch_size=self.inputs.batch_size,
            device=device,
        )
        store.write(self.key, predictions)


@dataclass(frozen=True)
class ChunkJob:
    """The predictions of all victims on one chunk of adversarial images, which are made once."""

    inputs: EvaluationInputs
    attack: SourcedAttack
    victims: tuple[Victim, ...]
    chunk: range

    def __str__(self) -> str:
        return f"{self.attack.facts.name}, images {self.chunk.start} to {self.chunk.stop - 1}"

    @property
    def key(self) -> ChunkKey:
        """What its adversarial images depend on."""
        facts = self.attack.facts
        return ChunkKey(
            attack=facts.fingerprint,
            source=facts.source.fingerprint,
            source_precision=facts.source.precision,
            data=self.inputs.data,
            seed=self.inputs.seed,
            start=self.chunk.start,
            stop=self.chunk.stop,
        )

    def loaded_models(self) -> Sequence[LoadedModel]:
        """Return the model the attack is made on, and the models attacked."""
        return [self.attack.loaded, *(victim.loaded for victim in self.victims)]

    def is_done(self, store: CellStore) -> bool:
        """Return True where the store has the predictions of every victim."""
        return {victim.name for victim in self.victims} <= store.read_chunk(self.key).keys()

    def compute(self, store: CellStore, device: torch.device) -> None:
        """Make the images, predict and keep the outcome, beside the predictions of victims that are there already."""
        images, labels = self.inputs.split.batch(torch.tensor(self.chunk), device=device)
        # The same whatever the size of the chunks.
        pictures = self.inputs.split.limited(_PICTURES, seed=self.inputs.seed)
        adversarial = self.attack.images(
            images,
            labels,
            seed=self.inputs.seed,
            chunk=self.chunk,
            pictures=pictures.batch(torch.arange(len(pictures)), device=device),
        )
        predictions: dict[str, Tensor] = {}
        # Not inference_mode: Brevitas's quantizers fail on its tensors.
        with torch.no_grad():
            for victim in self.victims:
                logits = victim.logits(self.inputs.seed, self.attack.facts.name, self.chunk.start)
                predictions[victim.name] = logits(adversarial).argmax(dim=1).cpu()
        # Read now: another process may have attacked other victims with these images meanwhile.
        store.write_chunk(self.key, store.read_chunk(self.key) | predictions)


def compute(
    jobs: Sequence[Job], store: CellStore, *, device: torch.device | str = "cpu", progress: Progress | None = None
) -> None:
    """Compute the jobs that are not done yet, one after the other.

    Args:
        jobs: what to do; their models are moved to the device and put in eval mode.
        store: keeps each cell as soon as it is finished.
        device: where the models run.
        progress: told after each job.

    Raises:
        UsageError: an attack that gave something else than images.
        CheckpointError: a cell cannot be written.
    """
    where = torch.device(device)
    with ExitStack() as stack:
        for loaded in _distinct(loaded for job in jobs for loaded in job.loaded_models()):
            stack.enter_context(frozen_weights(loaded.model.to(where).eval()))
        for number, job in enumerate(jobs, 1):
            if not job.is_done(store):
                job.compute(store, where)
            if progress is not None:
                progress(number, len(jobs), str(job))
        # Written over by another process in the moment between its reading and writing.
        for job in jobs:
            if not job.is_done(store):
                job.compute(store, where)


def _distinct(loaded_models: Iterable[LoadedModel]) -> Iterable[LoadedModel]:
    return {id(loaded.model): loaded for loaded in loaded_models}.values()
