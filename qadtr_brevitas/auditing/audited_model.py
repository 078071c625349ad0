"""The model under audit at one precision, and the other models that its attacker may take gradients from.

The undefended twin of a model is the same network trained on the same data without the defense. An attack that cannot
break the twin is too weak to show anything about the defense.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import TypeAlias

import torch
from torch import Tensor, nn

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.core.precision import Precision, PrecisionLike
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.quant import allowed_precisions, frozen_weights, precisions_or_all
from qadtr_brevitas.quant.inference import logits_at

ModelToAudit: TypeAlias = LoadedModel | nn.Module | Callable[[Tensor], Tensor]
"""A loaded model, a network (switchable or not), or any function from images in [0, 1] to logits."""


@dataclass
class ForwardCounter:
    """Counts the images in forward passes of a network, with and without gradients."""

    forward: int = 0
    gradient: int = 0

    def counted(self, model: Model) -> Model:
        """Return the same model, which counts."""

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
        name: name of the model.
        precision: None if the model is not switchable.
        logits: the model.
        other_precisions: the same weights at other precisions, by the names of these.
        full_precision: the same weights at 32 bit, if that is another precision.
        twin: the undefended twin, the same network trained without the defense.
        surrogates: other models, by their names.
        ablations: the same network with a part of the defense left out, by their names.
        passes: counts the forward passes of all these functions.
    """

    name: str
    precision: Precision | None
    logits: Model
    other_precisions: dict[str, Model] = field(default_factory=dict[str, Model])
    full_precision: Model | None = None
    twin: Model | None = None
    surrogates: dict[str, Model] = field(default_factory=dict[str, Model])
    ablations: dict[str, Model] = field(default_factory=dict[str, Model])
    passes: ForwardCounter

    def other_networks(self) -> dict[str, Model]:
        """Return the other networks that gradients may come from: surrogates and the undefended twin."""
        return self.surrogates | ({} if self.twin is None else {"undefended twin": self.twin})

    def check_classes(self, images: Tensor) -> None:
        """Check that all models have the same number of classes.

        Raises:
            DataError: one of them has another number.
        """
        with torch.no_grad():
            classes = self.logits(images[:1]).shape[1]
            for name, model in (self.other_networks() | self.ablations).items():
                if (others := model(images[:1]).shape[1]) != classes:
                    raise DataError(
                        f"{name} has {others} classes, {self.name} has {classes}: give models of the same data set"
                    )


def audited_models(
    model: ModelToAudit,
    *,
    precisions: Sequence[PrecisionLike] | None = None,
    twin: ModelToAudit | None = None,
    surrogates: Sequence[ModelToAudit] = (),
    ablations: Sequence[ModelToAudit] = (),
) -> list[AuditedModel]:
    """Return the model at each precision; a model that is not switchable, once.

    Twin, surrogates and ablations run at the precision of the audited model if they have it, else at their first.

    Raises:
        UsageError: the model does not allow one of the precisions, or precisions are given and it is not switchable.
    """
    return [
        _at_precision(model, precision, twin=twin, surrogates=surrogates, ablations=ablations)
        for precision in _precisions(model, precisions)
    ]


def _at_precision(
    model: ModelToAudit,
    precision: Precision | None,
    *,
    twin: ModelToAudit | None,
    surrogates: Sequence[ModelToAudit],
    ablations: Sequence[ModelToAudit],
) -> AuditedModel:
    passes = ForwardCounter()

    def counted(part: ModelToAudit, precision: Precision | None = precision) -> Model:
        return passes.counted(_logits_at(_network(part), precision))

    others = [other for other in _allowed(_network(model)) if other != precision]
    full = next((other for other in others if other.is_float), None)
    return AuditedModel(
        name=name_of(model),
        precision=precision,
        logits=counted(model),
        other_precisions={f"{other} bit": counted(model, other) for other in others},
        full_precision=None if full is None else counted(model, full),
        twin=None if twin is None else counted(twin),
        surrogates={name: counted(part) for name, part in _named(surrogates).items()},
        ablations={name: counted(part) for name, part in _named(ablations).items()},
        passes=passes,
    )


def name_of(model: ModelToAudit) -> str:
    """Return the name that findings use for a model."""
    if isinstance(model, LoadedModel):
        return model.name
    return model.__name__ if isinstance(model, FunctionType) else type(model).__name__


@contextmanager
def evaluation_mode(models: Iterable[ModelToAudit], *, device: torch.device | str) -> Generator[None]:
    """Put networks on the device and in eval mode within a block, and take no gradients of their parameters.

    At the end all is restored but the device.
    """
    with ExitStack() as stack:
        for network in dict.fromkeys(map(_network, models)):
            if isinstance(network, nn.Module):
                network.to(device)
                stack.enter_context(_evaluating(network))
                stack.enter_context(frozen_weights(network) if _allowed(network) else _no_gradients(network))
        yield


def _network(model: ModelToAudit) -> nn.Module | Callable[[Tensor], Tensor]:
    return model.model if isinstance(model, LoadedModel) else model


def _allowed(network: nn.Module | Callable[[Tensor], Tensor]) -> tuple[Precision, ...]:
    """Return the precisions of a switchable model, and none of others."""
    try:
        return allowed_precisions(network) if isinstance(network, nn.Module) else ()
    except UsageError:
        return ()


def _precisions(model: ModelToAudit, precisions: Sequence[PrecisionLike] | None) -> Sequence[Precision | None]:
    network = _network(model)
    if isinstance(network, nn.Module) and _allowed(network):
        return precisions_or_all(network, precisions)
    if precisions is not None:
        raise UsageError(f"{name_of(model)} is not switchable: leave the precisions out, or call convert() on it first")
    return [None]


def _logits_at(network: nn.Module | Callable[[Tensor], Tensor], precision: Precision | None) -> Model:
    allowed = _allowed(network)
    if not isinstance(network, nn.Module) or not allowed:
        return network
    return logits_at(network, [precision if precision in allowed else allowed[0]])


def _named(models: Sequence[ModelToAudit]) -> dict[str, ModelToAudit]:
    """Return models by name, numbered where names repeat."""
    named: dict[str, ModelToAudit] = {}
    for model in models:
        name, number = name_of(model), sum(key.split(" #")[0] == name_of(model) for key in named)
        named[f"{name} #{number + 1}" if number else name] = model
    return named


@contextmanager
def _evaluating(network: nn.Module) -> Generator[None]:
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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
