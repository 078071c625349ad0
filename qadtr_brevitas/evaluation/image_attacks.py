"""Attacks that make adversarial versions of the test images themselves, and the models they are made on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import ImageAttack, PatchAttack, TargetedAttack
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.files import fingerprint_facts
from qadtr_brevitas.core.plugin import plugin_settings
from qadtr_brevitas.core.seeding import derive_seed, generator
from qadtr_brevitas.core.version import __version__
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.report import ImageAttackFacts, SourceFacts
from qadtr_brevitas.quant.inference import InferenceMode, logits_at

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class NamedAttack:
    """A per-image attack plug-in under its registered name.

    Raises:
        UsageError: the plug-in makes universal patches only, or what no evaluation can score.
    """

    name: str
    plugin: Any

    def __post_init__(self) -> None:
        if not isinstance(self.plugin, ImageAttack):
            raise UsageError(
                f"{self.name} makes one patch for all images: make it with `qadtr-brevitas attack MODEL_DIR --attack "
                f"{self.name}`, then `qadtr-brevitas evaluate MODEL_DIR` scores it"
            )
        if self.plugin.not_scored is not None:
            raise UsageError(self.plugin.not_scored)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The plug-in's fields as JSON values."""
        return plugin_settings(self.plugin)

    @property
    def target(self) -> int | None:
        """The class it aims at; None where any wrong class counts."""
        return self.plugin.target if isinstance(self.plugin, TargetedAttack) else None

    @property
    def is_black_box(self) -> bool:
        """Whether it sees nothing but the model's outputs."""
        return self.plugin.black_box

    @cached_property
    def family(self) -> str:
        """Its name with the settings that are not the defaults, but for the target."""
        defaults = _default_settings(self.plugin)
        changed = {key: value for key, value in self.settings.items() if key not in defaults or defaults[key] != value}
        words = [f"{key}={value}" for key, value in changed.items() if key != "target"]
        # The name of a universal patch attack says that it is used on each image.
        per_image = ["per image"] if isinstance(self.plugin, PatchAttack) else []
        kind = per_image + (["targeted"] if self.target is not None else [])
        return " ".join([self.name, *kind, *words])

    @cached_property
    def fingerprint(self) -> str:
        """Of its name, its settings and the release whose code it is."""
        return fingerprint_facts([self.name, self.settings, __version__])


@dataclass(frozen=True)
class SourcedAttack:
    """A per-image attack and what it looks at.

    Args:
        attack: the attack.
        loaded: the model it is made on.
        mode: the precision it is made at, or those that it looks at together.
    """

    attack: NamedAttack
    loaded: LoadedModel
    mode: InferenceMode

    @cached_property
    def facts(self) -> ImageAttackFacts:
        """The attack's entry in the report."""
        mode, target = str(self.mode), self.attack.target
        aim = "" if target is None else f" to class {target}"
        return ImageAttackFacts(
            name=f"{self.attack.family}{aim} on {self.loaded.name} at {mode}",
            family=self.attack.family,
            attack=self.attack.name,
            black_box=self.attack.is_black_box,
            fingerprint=self.attack.fingerprint,
            settings=self.attack.settings,
            target=target,
            source=SourceFacts(name=self.loaded.name, fingerprint=self.loaded.fingerprint, precision=mode),
        )

    def images(self, images: Tensor, labels: Tensor, *, seed: int, chunk: range) -> Tensor:
        """Adversarial versions of a chunk of images.

        The random stream depends on the seed, the attack and the chunk only: neither on what was attacked before nor
        on the model.

        Args:
            images: (n, 3, H, W) in [0, 1], on the model's device.
            labels: (n,).
            seed: of the evaluation.
            chunk: which of the test images they are.

        Returns:
            (n, 3, H, W) in [0, 1].

        Raises:
            UsageError: the attack gave something else.
        """
        keys = ("image attack", self.attack.fingerprint, chunk.start, chunk.stop)
        precision = self.mode.precisions[0] if self.mode.is_single else None
        # Attacks from libraries draw from the global generators, which no one else may notice.
        with torch.random.fork_rng(_cuda_devices(images)):
            torch.manual_seed(derive_seed(seed, *keys, "global"))
            found = self.attack.plugin.run(
                logits_at(self.loaded.model, self.mode, draws=generator(seed, *keys, "precisions")),
                images,
                labels,
                generator=generator(seed, *keys),
                precision=precision,
            )
        return _checked(found.detach(), images, self.attack.name)


def _default_settings(plugin: Any) -> dict[str, Any]:
    try:
        return plugin_settings(type(plugin)())
    # A plug-in with a field that has to be given has no defaults.
    except (TypeError, ValueError):
        return {}


def _cuda_devices(images: Tensor) -> Sequence[torch.device]:
    return [images.device] if images.is_cuda else []


def _checked(found: Tensor, images: Tensor, name: str) -> Tensor:
    inside = bool(((found >= -_TOLERANCE) & (found <= 1 + _TOLERANCE)).all())
    # NaN is outside too.
    if found.shape != images.shape or not inside:
        raise UsageError(
            f"attack {name} gave images that are not of the given shape or not in [0, 1]: choose other settings, or "
            "report it to whoever wrote the attack"
        )
    return found.clamp(0, 1)
