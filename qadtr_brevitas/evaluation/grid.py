"""What an evaluation has to compute: which patches and attacks meet which models and precisions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import DefenseAttack
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision, PrecisionLike
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.split import Split, balanced_order
from qadtr_brevitas.evaluation.certification import PORTION, Certification, CertifyJob, masks_fingerprint
from qadtr_brevitas.evaluation.defended import DefendedModel
from qadtr_brevitas.evaluation.entries import LoadedModel, NamedPatch
from qadtr_brevitas.evaluation.image_attacks import NamedAttack, SourcedAttack
from qadtr_brevitas.evaluation.jobs import ChunkJob, EvaluationInputs, Job, PatchJob, Victim
from qadtr_brevitas.evaluation.predict import placements
from qadtr_brevitas.evaluation.report import DataFacts, SourceFacts, Threat
from qadtr_brevitas.quant import allowed_precisions, precisions_or_all
from qadtr_brevitas.quant.inference import InferenceMode, check_differentiable, parse_mode

Transfer: TypeAlias = Literal["all", "float", "none"]
"""What is moved to models and precisions it was not made on: everything, what was made at 32 bit, or nothing."""

_FLOAT = InferenceMode((Precision(FLOAT_BITS, FLOAT_BITS),))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The checked plan of an evaluation.

    Every patch, a control of noise for each geometry, and every attack meet every model at every precision.

    Args:
        loaded_models: the models.
        patches: the patches; with none and no attacks there are clean accuracies only.
        split: the images and labels.
        data_name: name of the data set, for the report.
        data_settings: its settings, for the report.
        available: how many images the whole test split has; None if `split` is all of it.
        attacks: attacks on each image by itself, made on every model at every precision.
        surrogates: models that attacks are made on as well, but that are not scored.
        eot: several precisions together that attacks are made on as well.
        precisions: precisions to score, or several together; None for each that a model allows. Where several are
            scored together, attacks are made on their mean.
        transfer: what to move to other models and precisions; white-box, EOT and control cells are always scored.
        certifications: patches that models are certified against, at every precision.
        certify_images: certify so many of the images only, balanced over classes, whatever the seed; None for all.
        seed: seed of the placements, the controls and the attacks.
        batch_size: images in one forward pass. Attacks take the images in chunks of this size, each with a random
            stream of its own: another size gives other attacks.

    Raises:
        UsageError: a precision that a model does not allow, a patch that does not fit the images, a certification of
            random precisions, a target that is no class, two models, patches or attacks of one name, or surrogates from
            which nothing may be transferred.
        DataError: a model is for other images or another number of classes.
    """

    loaded_models: Sequence[LoadedModel]
    patches: Sequence[NamedPatch]
    split: Split
    data_name: str
    data_settings: Mapping[str, Any] = field(default_factory=dict)
    available: int | None = None
    attacks: Sequence[NamedAttack] = ()
    surrogates: Sequence[LoadedModel] = ()
    eot: Sequence[InferenceMode] = ()
    precisions: Sequence[PrecisionLike | InferenceMode] | None = None
    transfer: Transfer = "all"
    certifications: Sequence[Certification] = ()
    certify_images: int | None = None
    seed: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.surrogates and self.transfer == "none":
            raise UsageError("attacks made on a surrogate have to be transferred: give --transfer all or float with it")
        for loaded in (*self.loaded_models, *self.surrogates):
            loaded.check_data(self.split, data=self.data_name)
        _check_names("models", [loaded.name for loaded in (*self.loaded_models, *self.surrogates)])
        _check_names("patches", [patch_entry.name for patch_entry in self.patch_entries])
        for patch_entry in self.patch_entries:
            self._check_patch(patch_entry)
        for attack in self.attacks:
            self._check_target(f"attack {attack.name}", attack.target, "choose one of its classes as target")
        _check_names("attacks", [attack.facts.name for attack, _ in self.sourced_attacks], cure="give each attack once")
        self._check_defenses()
        self._check_certifications()

    @cached_property
    def data(self) -> DataFacts:
        """The report's entry of the images."""
        return DataFacts(
            name=self.data_name,
            settings=dict(self.data_settings),
            images=len(self.split),
            available=len(self.split) if self.available is None else self.available,
            image_size=self.split.image_size,
            classes=self.split.classes,
            fingerprint=self.split.fingerprint,
        )

    @cached_property
    def inputs(self) -> EvaluationInputs:
        """What all cells share."""
        return EvaluationInputs(self.split, self.data.fingerprint, self.seed, self.batch_size)

    @cached_property
    def certified_order(self) -> Tensor:
        """The images in the order in which they are certified, int64 (N,): of any number of them, those are the first.

        It depends on the images alone: a certificate has nothing random, and more images, or all of them, later take up
        where fewer end.
        """
        return balanced_order(self.split.labels, seed=0)

    @property
    def certified_count(self) -> int:
        """How many images are certified, the first of `certified_order`."""
        return len(self.split) if self.certify_images is None else self.certify_images

    @cached_property
    def patch_entries(self) -> tuple[NamedPatch, ...]:
        """The patches, and for each geometry a patch of noise as control."""
        return (*self.patches, *controls(self.patches, seed=self.seed))

    @cached_property
    def victims(self) -> tuple[Victim, ...]:
        """Every model at every precision that is scored."""
        return tuple(
            Victim(loaded, precision) for loaded in self.loaded_models for precision in self.precisions_of(loaded)
        )

    @property
    def certified_victims(self) -> tuple[Victim, ...]:
        """The victims that are certified: defended ones are not certified once more."""
        return tuple(victim for victim in self.victims if not isinstance(victim.loaded.model, DefendedModel))

    @cached_property
    def sourced_attacks(self) -> tuple[tuple[SourcedAttack, tuple[Victim, ...]], ...]:
        """Every per-image attack on every source, with the victims its images are for."""
        found: list[tuple[SourcedAttack, tuple[Victim, ...]]] = []
        for attack in self.attacks:
            for loaded in (*self.loaded_models, *self.surrogates):
                for source in self._sources(loaded):
                    if not attack.can_be_made_on(loaded.model, source):
                        continue
                    sourced = SourcedAttack(attack, loaded, source)
                    victims = tuple(victim for victim in self.victims if self._is_wanted(sourced.facts.source, victim))
                    found += [(sourced, victims)] if victims else []
        return tuple(found)

    def precisions_of(self, loaded: LoadedModel) -> tuple[InferenceMode, ...]:
        """Return the precisions, and several together, that a model is scored at."""
        wanted = allowed_precisions(loaded.model) if self.precisions is None else self.precisions
        found = tuple(dict.fromkeys(map(parse_mode, wanted)))
        for mode in found:
            precisions_or_all(loaded.model, mode.precisions)
        return found

    def patches_on(self, victim: Victim) -> list[NamedPatch]:
        """Return the patches that are put before a victim."""
        return [c for c in self.patch_entries if c.control or self._is_wanted(c.facts.source, victim)]

    def jobs(self) -> list[Job]:
        """Return the cells of the evaluation, in an order that depends on nothing but its arguments."""
        patched = [PatchJob(self.inputs, v, c) for v in self.victims for c in (None, *self.patches_on(v))]
        attacked = [
            ChunkJob(self.inputs, attack, victims, chunk)
            for attack, victims in self.sourced_attacks
            for chunk in self.chunks()
        ]
        certified = [
            job for v in self.certified_victims for c in self.certifications for job in self.certify_jobs(v, c)
        ]
        return [*patched, *attacked, *certified]

    def certify_jobs(self, victim: Victim, certification: Certification) -> list[CertifyJob]:
        """Return the cells of one certification of one victim."""
        images = self.certified_count
        portions = (range(start, min(start + PORTION, images)) for start in range(0, images, PORTION))
        masks = masks_fingerprint(certification, victim.loaded.info.mean, self.split.image_size)
        return [
            CertifyJob(self.inputs, victim, certification, masks, self.certified_order, portion) for portion in portions
        ]

    def chunks(self) -> Iterator[range]:
        """Return the test images in the portions that per-image attacks take them in."""
        images, size = len(self.split), self.batch_size
        return (range(start, min(start + size, images)) for start in range(0, images, size))

    def targets_of(self, patch_entry: NamedPatch) -> list[int | None]:
        """Return what a patch is scored for; a control is scored for the aims of all patches of its geometry."""
        if not patch_entry.control:
            return [patch_entry.facts.target]
        alike = [patch.facts.target for patch in self.patches if patch.facts.geometry == patch_entry.facts.geometry]
        return list(dict.fromkeys(alike))

    def _sources(self, loaded: LoadedModel) -> list[InferenceMode]:
        """Return the precisions, and several together, that attacks on a model are made at."""
        allowed = allowed_precisions(loaded.model)
        if loaded in self.loaded_models:
            scored = self.precisions_of(loaded)
        else:
            given = map(parse_mode, self.precisions or allowed)
            scored = tuple(mode for mode in given if set(mode.precisions) <= set(allowed))
        # A vote has no gradient, and that of a random draw is noise: their mean is the attack that breaks both.
        wanted = [mode if mode.is_single else InferenceMode(mode.precisions) for mode in scored]
        if self.transfer == "float" and _FLOAT.precisions[0] in allowed:
            wanted.append(_FLOAT)
        for mode in self.eot:
            precisions_or_all(loaded.model, mode.precisions)
        return list(dict.fromkeys((*wanted, *self.eot)))

    def _is_wanted(self, source: SourceFacts | None, victim: Victim) -> bool:
        if self.transfer == "all" or threat(source, victim) != "transfer":
            return True
        return self.transfer == "float" and source is not None and parse_mode(source.precision) == _FLOAT

    def _check_patch(self, patch_entry: NamedPatch) -> None:
        source = patch_entry.facts.source
        try:
            placements(patch_entry.patch, 1, self.split.image_size, seed=self.seed)
            patch_entry.patch.check_channels(self.split.channels)
            if source is not None:
                parse_mode(source.precision)
        except UsageError as error:
            cure = "; scale it with --patch-size N" if patch_entry.is_own else ""
            raise UsageError(f"patch {patch_entry.name!r}: {error}{cure}") from error
        cure = "choose the data set it was made on with --data"
        self._check_target(f"patch {patch_entry.name!r}", patch_entry.facts.target, cure)

    def _check_defenses(self) -> None:
        made = {attack.attack.name for attack, _ in self.sourced_attacks}
        for attack in self.attacks:
            if isinstance(attack.plugin, DefenseAttack) and attack.name not in made:
                raise UsageError(
                    f"{attack.name} attacks a prediction defended by double masking, and there is none: add --defend "
                    f"SIZE, for instance --defend 5, or leave {attack.name} out"
                )

    def _check_certifications(self) -> None:
        _check_names("certifications", list(map(str, self.certifications)), cure="give each patch size once")
        for certification in self.certifications:
            certification.covering(self.split.image_size)
        if self.certify_images is not None and not 1 <= self.certify_images <= len(self.split):
            raise UsageError(
                f"{self.certify_images} images cannot be certified of {len(self.split)}: give 1 to {len(self.split)}"
            )
        for victim in self.victims:
            if self.certifications and victim.precision.is_random:
                raise UsageError(
                    f"{victim} answers differently each time, so that nothing can be proved: leave out --certify, or "
                    f"score {', '.join(map(str, victim.precision.precisions))} each by itself"
                )

    def _check_target(self, what: str, target: int | None, cure: str) -> None:
        classes = len(self.split.classes)
        if target is not None and not 0 <= target < classes:
            raise UsageError(f"{what} aims at class {target}, the data set has {classes} classes: {cure}")


def threat(source: SourceFacts | None, victim: Victim) -> Threat:
    """Return what an attack made on a source knows of a victim; controls are not asked about."""
    if source is None or source.fingerprint != victim.loaded.fingerprint:
        return "transfer"
    if not parse_mode(source.precision).is_single:
        return "eot"
    return "white-box" if source.precision == str(victim.precision) else "transfer"


def controls(patches: Sequence[NamedPatch], *, seed: int) -> list[NamedPatch]:
    """Return a patch of uniform noise, on the 8-bit grid, for each size, shape and place among the patches."""
    found: dict[str, NamedPatch] = {}
    for patch_entry in patches:
        patch, geometry = patch_entry.patch, patch_entry.facts.geometry
        if geometry in found:
            continue
        noise = torch.randint(256, patch.texture.shape, generator=generator(seed, "control", geometry)) / 255
        height, width = patch.size
        same_size = sum(other.patch.size == patch.size for other in found.values())
        name = f"noise {height}x{width}" + (f" ({same_size + 1})" if same_size else "")
        control = replace(patch, texture=noise, meta={"attack": "noise"})
        found[geometry] = NamedPatch(name, control, control=True)
    return list(found.values())


def read_means(texts: Sequence[str], attacks: Sequence[NamedAttack]) -> tuple[InferenceMode, ...]:
    """Several precisions together, as 8+4+2 or random(8+4+2), that attacks are to be made on.

    Raises:
        UsageError: one that cannot be read, is of a single precision or has no gradient, or no attacks to make on it.
    """
    if texts and not attacks:
        raise UsageError(
            f"--eot {texts[0]} says what an --attack is made on: give one, or make patches on it with "
            f"`qadtr-brevitas attack MODEL_DIR --precision {texts[0]}`"
        )
    means = tuple(dict.fromkeys(map(parse_mode, texts)))
    for mean in means:
        if mean.is_single:
            raise UsageError(
                f"--eot {mean} is no mean: give several precisions, as 8+4+2; single ones are attacked anyway"
            )
        check_differentiable(mean)
    return means


def _check_names(kind: str, names: Sequence[str], *, cure: str = "give each a name of its own") -> None:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two {kind} are called {repeated[0]!r}: {cure}")
