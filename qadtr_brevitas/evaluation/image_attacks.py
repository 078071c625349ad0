"""Per-image attacks, which make an adversarial version of each test image, and the models that they search on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from qadtr_brevitas.attacks.base import (
    Attack,
    DefenseAttack,
    ImageAttack,
    IndexedAttack,
    PatchAttack,
    TargetedAttack,
)
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.files import fingerprint_facts
from qadtr_brevitas.core.plugin import plugin_settings
from qadtr_brevitas.core.registry import ATTACKS
from qadtr_brevitas.core.seeding import derive_seed, generator
from qadtr_brevitas.core.version import __version__
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.report import ImageAttackFacts, SourceFacts
from qadtr_brevitas.quant import at_precision
from qadtr_brevitas.quant.inference import InferenceMode, logits_at

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class NamedAttack:
    """A per-image attack with its name.

    Args:
        name: the registered name.
        plugin: the attack, an `ImageAttack`.

    Raises:
        UsageError: the attack makes universal patches only, or it does not allow to be scored (`not_scored`).
    """

    name: str
    plugin: ImageAttack

    def __post_init__(self) -> None:
        # The registry has attacks of both kinds.
        if not isinstance(cast("Attack", self.plugin), ImageAttack):
            raise UsageError(
                f"{self.name} makes one patch for all images: make it with `qadtr-brevitas attack MODEL_DIR --attack "
                f"{self.name}`, then `qadtr-brevitas evaluate MODEL_DIR` scores it"
            )
        if self.plugin.not_scored is not None:
            raise UsageError(self.plugin.not_scored)

    @classmethod
    def of(cls, attack: Attack | str) -> NamedAttack:
        """Return an attack under its registered name, or under the name of its class if it is not registered.

        Args:
            attack: the attack, or a registered name, which stands for the attack with its default settings.

        Raises:
            UsageError: there is no attack of this name, or it cannot be scored.
        """
        plugin: Attack = ATTACKS.load(attack)() if isinstance(attack, str) else attack
        return cls(ATTACKS.name_of(type(plugin)) or type(plugin).__name__, cast("ImageAttack", plugin))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of the attack as JSON values."""
        return plugin_settings(self.plugin)

    @property
    def target(self) -> int | None:
        """The target class; None for an untargeted attack."""
        return self.plugin.target if isinstance(self.plugin, TargetedAttack) else None

    @property
    def passes(self) -> tuple[int, int] | None:
        """The forward and backward passes for an image, at most; None if the attack does not tell them."""
        if not isinstance(self.plugin, IndexedAttack):
            return None
        return self.plugin.passes.forward, self.plugin.passes.backward

    def can_be_made_on(self, network: nn.Module, mode: InferenceMode) -> bool:
        """Return whether the attack works on a model at an inference mode: one on a defense needs the defense."""
        return not isinstance(self.plugin, DefenseAttack) or (mode.is_single and self.plugin.accepts(network))

    @property
    def is_black_box(self) -> bool:
        """Whether the attack sees the outputs of the model only."""
        return self.plugin.black_box

    @cached_property
    def family(self) -> str:
        """The name with all settings that are not the defaults, except the target: attacks to average over share it."""
        defaults = _default_settings(self.plugin)
        changed = {key: value for key, value in self.settings.items() if key not in defaults or defaults[key] != value}
        words = [f"{key}={value}" for key, value in changed.items() if key != "target"]
        # The name of a universal patch attack says that it is used on each image.
        per_image = ["per image"] if isinstance(self.plugin, PatchAttack) else []
        kind = per_image + (["targeted"] if self.target is not None else [])
        return " ".join([self.name, *kind, *words])

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the name, the settings and the release of this package."""
        return fingerprint_facts([self.name, self.settings, __version__])


@dataclass(frozen=True)
class SourcedAttack:
    """A per-image attack together with its source: the model and the inference mode that it searches on.

    The images it makes are then shown to every victim, so that the source may be the victim itself (white-box) or not
    (transfer).

    Args:
        attack: the attack.
        loaded: the source model.
        mode: the precision of the source, or the precisions whose mean the attack follows.
    """

    attack: NamedAttack
    loaded: LoadedModel
    mode: InferenceMode

    @cached_property
    def facts(self) -> ImageAttackFacts:
        """The entry of the attack in the report."""
        mode, target = str(self.mode), self.attack.target
        aim = "" if target is None else f" to class {target}"
        return ImageAttackFacts(
            name=f"{self.attack.family}{aim} on {self.loaded.name} at {mode}",
            family=self.attack.family,
            attack=self.attack.name,
            black_box=self.attack.is_black_box,
            passes=self.attack.passes,
            fingerprint=self.attack.fingerprint,
            settings=self.attack.settings,
            target=target,
            source=SourceFacts(name=self.loaded.name, fingerprint=self.loaded.fingerprint, precision=mode),
        )

    def images(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        seed: int,
        chunk: range,
        pictures: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return adversarial versions of a chunk of images.

        The random stream depends on the seed, the attack and the chunk only, not on the model or on earlier attacks; of
        an `IndexedAttack` not on the chunk either, but on each image's index.

        Args:
            images: (n, C, H, W) in [0, 1], on the device of the model.
            labels: (n,), the true classes.
            seed: seed of the evaluation.
            chunk: indices of the images in the test split.
            pictures: images and labels that an `IndexedAttack` may start from; None for those of the chunk.

        Returns:
            (n, C, H, W) in [0, 1].

        Raises:
            UsageError: the attack returned images of another shape or range.
        """
        plugin, places = self.attack.plugin, (chunk.start, chunk.stop)
        keys = ("image attack", self.attack.fingerprint, *(() if isinstance(plugin, IndexedAttack) else places))
        run = plugin.run
        if isinstance(plugin, IndexedAttack):
            run = partial(plugin.run, indices=chunk, pictures=pictures)
        precision = self.mode.precisions[0] if self.mode.is_single else None
        draws = generator(seed, *keys)
        if isinstance(plugin, DefenseAttack):
            with at_precision(self.loaded.model, self.mode.precisions[0]), torch.enable_grad():
                found = plugin.run_against(self.loaded.model, images, labels, generator=draws)
            return _checked(found.detach(), images, self.attack.name)
        # Attacks from libraries draw from the global generators, whose state must be the same afterwards.
        with torch.random.fork_rng(_cuda_devices(images)):
            torch.manual_seed(derive_seed(seed, *keys, "global"))
            found = run(
                logits_at(self.loaded.model, self.mode, draws=generator(seed, *keys, "precisions")),
                images,
                labels,
                generator=draws,
                precision=precision,
            )
        return _checked(found.detach(), images, self.attack.name)


def _default_settings(plugin: ImageAttack) -> dict[str, Any]:
    try:
        return plugin_settings(type(plugin)())
    # A plug-in with a required field has no defaults.
    except (TypeError, ValueError):
        return {}


def _cuda_devices(images: Tensor) -> Sequence[torch.device]:
    return [images.device] if images.is_cuda else []


def _checked(found: Tensor, images: Tensor, name: str) -> Tensor:
    inside = bool(((found >= -_TOLERANCE) & (found <= 1 + _TOLERANCE)).all())
    # `inside` is False for NaN as well.
    if found.shape != images.shape or not inside:
        raise UsageError(
            f"attack {name} returned images of another shape or with values outside [0, 1]: choose other settings, or "
            "report it to the author of the attack"
        )
    return found.clamp(0, 1)
