"""The model under audit at one precision, and the other models that its attacker may take gradients from."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.core.precision import Precision, PrecisionLike
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.quant import allowed_precisions, frozen_weights, precisions_or_all
from qadtr_brevitas.quant.inference import logits_at

Audited: TypeAlias = LoadedModel | nn.Module | Callable[[Tensor], Tensor]
"""A loaded model, a network (switchable or not), or any function from images in [0, 1] to logits."""


@dataclass
class ForwardCounter:
    """Counts the images that went through a network."""

    forward: int = 0
    gradient: int = 0

    def counted(self, model: Model) -> Model:
        """The same model, counting."""

        def logits(images: Tensor) -> Tensor:
            if images.requires_grad and torch.is_grad_enabled():
                self.gradient += len(images)
            else:
                self.forward += len(images)
            return model(images)

        return logits


@dataclass(frozen=True, kw_only=True)
class AuditedModel:
    """A model at one precision and what its attacker has besides; every model is a function from images to logits.

    Args:
        name: of the model.
        precision: None if the model is not switchable.
        logits: the model.
        others: the same weights at its other precisions, by their names.
        full: the same weights at 32 bit, if that is another precision.
        twin: the same network without the defense.
        surrogates: other models, by their names.
        ablations: the same network with a part of the defense left out, by their names.
        passes: counts what the functions are used for.
    """

    name: str
    precision: Precision | None
    logits: Model
    others: dict[str, Model] = field(default_factory=dict[str, Model])
    full: Model | None = None
    twin: Model | None = None
    surrogates: dict[str, Model] = field(default_factory=dict[str, Model])
    ablations: dict[str, Model] = field(default_factory=dict[str, Model])
    passes: ForwardCounter

    def sources(self) -> dict[str, Model]:
        """Other networks that gradients may come from: surrogates and the twin."""
        return self.surrogates | ({} if self.twin is None else {"undefended twin": self.twin})

    def check_classes(self, images: Tensor) -> None:
        """Checks that all models know the same classes.

        Raises:
            DataError: one has another number of classes.
        """
        with torch.no_grad():
            classes = self.logits(images[:1]).shape[1]
            for name, model in (self.sources() | self.ablations).items():
                if (found := model(images[:1]).shape[1]) != classes:
                    raise DataError(
                        f"{name} has {found} classes, {self.name} has {classes}: give models of the same data set"
                    )


def victims(
    model: Audited,
    *,
    precisions: Sequence[PrecisionLike] | None = None,
    twin: Audited | None = None,
    surrogates: Sequence[Audited] = (),
    ablations: Sequence[Audited] = (),
) -> list[AuditedModel]:
    """The model at each precision; a model that is not switchable, once.

    Twin, surrogates and ablations are taken at the precision of the victim where they have it, else at their first.

    Raises:
        UsageError: a precision that the model does not allow, or any if it is not switchable.
    """
    network, wanted = _network(model), _precisions(model, precisions)
    found: list[AuditedModel] = []
    for precision in wanted:
        passes = ForwardCounter()

        def at(part: Audited, place: Precision | None = precision, passes: ForwardCounter = passes) -> Model:
            return passes.counted(_at(_network(part), place))

        allowed = _allowed(network)
        others = [other for other in allowed if other != precision]
        full = next((other for other in others if other.is_float), None)
        found.append(
            AuditedModel(
                name=name_of(model),
                precision=precision,
                logits=at(model),
                others={f"{other} bit": at(model, other) for other in others},
                full=None if full is None else at(model, full),
                twin=None if twin is None else at(twin),
                surrogates={name: at(part) for name, part in _named(surrogates).items()},
                ablations={name: at(part) for name, part in _named(ablations).items()},
                passes=passes,
            )
        )
    return found


def name_of(model: Audited) -> str:
    """What findings call a model."""
    if isinstance(model, LoadedModel):
        return model.name
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", type(model).__name__)


@contextmanager
def held_still(models: Iterable[Audited], *, device: torch.device | str) -> Generator[None]:
    """Networks on the device, in eval mode, with no parameter that takes a gradient; restores all but the device."""
    with ExitStack() as stack:
        for network in dict.fromkeys(map(_network, models)):
            if isinstance(network, nn.Module):
                network.to(device)
                stack.enter_context(_evaluating(network))
                stack.enter_context(frozen_weights(network) if _allowed(network) else _no_gradients(network))
        yield


def _network(model: Audited) -> nn.Module | Callable[[Tensor], Tensor]:
    return model.model if isinstance(model, LoadedModel) else model


def _allowed(network: nn.Module | Callable[[Tensor], Tensor]) -> tuple[Precision, ...]:
    """The precisions of a switchable model, none for others."""
    try:
        return allowed_precisions(network) if isinstance(network, nn.Module) else ()
    except UsageError:
        return ()


def _precisions(model: Audited, precisions: Sequence[PrecisionLike] | None) -> Sequence[Precision | None]:
    network = _network(model)
    if isinstance(network, nn.Module) and _allowed(network):
        return precisions_or_all(network, precisions)
    if precisions is not None:
        raise UsageError(f"{name_of(model)} is not switchable: leave the precisions out, or call convert() on it first")
    return [None]


def _at(network: nn.Module | Callable[[Tensor], Tensor], precision: Precision | None) -> Model:
    allowed = _allowed(network)
    if not isinstance(network, nn.Module) or not allowed:
        return network
    return logits_at(network, [precision if precision in allowed else allowed[0]])


def _named(models: Sequence[Audited]) -> dict[str, Audited]:
    """Models by name, numbered where names repeat."""
    found: dict[str, Audited] = {}
    for model in models:
        name, number = name_of(model), sum(key.split(" #")[0] == name_of(model) for key in found)
        found[f"{name} #{number + 1}" if number else name] = model
    return found


@contextmanager
def _evaluating(network: nn.Module) -> Generator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


@contextmanager
def _no_gradients(network: nn.Module) -> Generator[None]:
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
