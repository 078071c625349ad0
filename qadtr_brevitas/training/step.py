"""What an objective sees of a training step: images, labels, adversarial images, and forward passes at any precision.

An objective computes one loss for one batch at one precision; a step at several precisions computes one for each. The
objects here know no recipe: the loop says how adversarial images are made and what the ordinary loss is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qadtr_brevitas.core.errors import UsageError, suggest
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.quant import SwitchableModel, allowed_precisions, at_precision
from qadtr_brevitas.quant.layers import low_bit_weights
from qadtr_brevitas.quant.switch import evaluating

FLOAT = Precision(FLOAT_BITS, FLOAT_BITS)


@dataclass(frozen=True)
class StepLoss:
    """A loss and what is worth logging about it.

    Args:
        loss: 0-dim, with a graph to the parameters.
        metrics: figures by name, numbers or tensors of one element. They are logged, shown and averaged over the
            epoch; of several processes, those of the first. Figures that are not finite are left out.
    """

    loss: Tensor
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict[str, float | Tensor])


class ForwardOutput(NamedTuple):
    """The result of a forward pass: logits (N, classes), and the features of each module that was asked for."""

    logits: Tensor
    features: dict[str, Tensor]


class EarlierPass(NamedTuple):
    """What an optimizer step computed at a precision before: the images (N, 3, H, W) and their logits, detached."""

    precision: Precision
    images: Tensor
    logits: Tensor


class AdversarialBatch(NamedTuple):
    """Images (N, 3, H, W) of which the first `attacked` are adversarial, and those of `masked` (N,) under masks.

    Without `masked` no image is under a mask.
    """

    images: Tensor
    attacked: int
    masked: Tensor | None = None


class TrainingStep:
    """One batch at one precision, as an objective or regularizer sees it.

    Args:
        model: the model, in training mode and at `precision`.
        images: (N, 3, H, W) in [0, 1], augmented.
        labels: (N,), the true classes; of mixed images, that of the larger share.
        precision: the precision that this loss is for.
        number: optimizer steps done before this one.
        seed: the recipe's seed.
        rank: number of this process.
        attack: makes the batch that is attacked and masked; called at most once.
        default_loss: computes the ordinary loss of a forward pass on the adversarial batch.
        default_features: patterns of the features that `default_loss` needs.
        compiled: a faster form of the model for training passes; None if there is none.
        active: the precisions that the schedule draws from at this time; empty for all of the model.
        earlier: what the same optimizer step computed at the precision before; None for its first.
        targets: (N, classes), the share of each class in mixed images; None where images are not mixed.

    Attributes:
        default_features: patterns of the features that an output given to `default_loss` must have.
        passed: the pass that `default_loss` saw, as the next precision's `earlier`; None before.
    """

    def __init__(
        self,
        model: SwitchableModel,
        images: Tensor,
        labels: Tensor,
        *,
        precision: Precision,
        number: int,
        seed: int,
        rank: int,
        attack: Callable[[], AdversarialBatch],
        default_loss: Callable[[TrainingStep, ForwardOutput], StepLoss],
        default_features: Sequence[str] = (),
        compiled: Callable[[Tensor], Tensor] | None = None,
        active: Sequence[Precision] = (),
        earlier: EarlierPass | None = None,
        targets: Tensor | None = None,
    ) -> None:
        self.images, self.labels, self.targets = images, labels, targets
        self.precision, self.number = precision, number
        self._model, self._seed, self._rank = model, seed, rank
        self._attack = attack
        self._default_loss, self.default_features = default_loss, tuple(default_features)
        self._active, self._compiled = tuple(active), compiled
        self._earlier = earlier
        self.passed: EarlierPass | None = None

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """All precisions of the model."""
        return allowed_precisions(self._model)

    @property
    def active(self) -> tuple[Precision, ...]:
        """The precisions that the schedule draws from at this time."""
        return self._active or self.precisions

    @cached_property
    def adversarial(self) -> AdversarialBatch:
        """The batch as the recipe's attack and masks make it, when this is first read."""
        return self._attack()

    def generator(self, purpose: str, *, shared: bool = False) -> torch.Generator:
        """Return a random stream on the CPU for one purpose, a function of seed, step, precision, rank and purpose.

        Args:
            purpose: a name of its own for each thing that is drawn.
            shared: leave out the rank, so that all processes draw the same.
        """
        own = () if shared else (self._rank,)
        return generator(self._seed, "objective", purpose, self.number, str(self.precision), *own)

    def forward(
        self, images: Tensor, *, precision: Precision | None = None, features: Sequence[str] = ()
    ) -> ForwardOutput:
        """Run the model in training mode, with gradients; its precision and mode are as before afterwards.

        Every call updates the running statistics of norm layers at that precision.

        Args:
            images: (N, 3, H, W) in [0, 1].
            precision: precision to run at; None for the step's own.
            features: patterns of module names, as `layer*` or `blocks.*.mlp`, whose outputs are returned. The names
                are those of the float network (`named_modules`); `*` stands for one part of a name, or some of it.

        Returns:
            Logits, and features by module name in the order in which the modules ran. A module that runs several
            times has entries `name`, `name#2` and so on.

        Raises:
            UsageError: the model lacks the precision, a pattern matches no module, or a matching module does not
                return a tensor.
        """
        with at_precision(self._model, precision or self.precision), _captured(self._model, features) as found:
            return ForwardOutput(self._fastest(images, features)(images), found)

    def _fastest(self, images: Tensor, features: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """Return the compiled model where it can do what is asked: neither features nor gradients of gradients."""
        plain = self._model.training and torch.is_grad_enabled() and not features and not images.requires_grad
        return self._compiled if self._compiled is not None and plain else self._model

    def teacher(self, images: Tensor, *, precision: Precision = FLOAT, features: Sequence[str] = ()) -> ForwardOutput:
        """Run the model in evaluation mode without gradients; its precision and mode are as before afterwards.

        Arguments, result and errors are those of `forward`. The default precision is 32 bit.
        """
        try:
            with evaluating(self._model):
                return self.forward(images, precision=precision, features=features)
        finally:
            # Autocast would give its copies of the weights, made without gradients here, to later forward passes.
            torch.clear_autocast_cache()

    def earlier_logits(self) -> Tensor | None:
        """Return logits (N, classes) of the precision that the optimizer step computed before, on `adversarial.images`.

        Those of its training pass where it saw the same images, else those of `teacher`. None for the first precision.
        """
        if self._earlier is None:
            return None
        images = self.adversarial.images
        if images is self._earlier.images:
            return self._earlier.logits
        return self.teacher(images, precision=self._earlier.precision).logits

    def low_bit_weights(self) -> dict[str, Tensor]:
        """Return the float weights, by module name, of the layers that are quantized to less than 8 bit."""
        return low_bit_weights(self._model)

    def input_gradient(self, loss: Tensor, images: Tensor) -> Tensor:
        """Return the gradient of a loss with respect to images, differentiable itself.

        Under `train.amp=fp16` the gradient is not scaled, so that small values become zero.

        Args:
            loss: 0-dim, computed from `images`.
            images: (N, 3, H, W), with `requires_grad` set before the forward pass.

        Returns:
            (N, 3, H, W).
        """
        return torch.autograd.grad(loss, images, create_graph=True)[0]

    def default_loss(self, output: ForwardOutput | None = None) -> StepLoss:
        """Return the ordinary loss: cross-entropy with label smoothing, and the recipe's regularizers.

        Args:
            output: the result of a forward pass on `adversarial.images` at the step's precision, where there is one
                already; None to run it.
        """
        if output is None:
            output = self.forward(self.adversarial.images, features=self.default_features)
        self.passed = EarlierPass(self.precision, self.adversarial.images, output.logits.detach())
        return self._default_loss(self, output)


@contextmanager
def _captured(model: SwitchableModel, patterns: Sequence[str]) -> Generator[dict[str, Tensor]]:
    """Collect the outputs of modules by name for the duration of a block."""
    found: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []
    try:
        for name, module in _matching(model.net, patterns).items():
            handles.append(module.register_forward_hook(_hook(found, name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hook(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
    def keep(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if not isinstance(output, Tensor):
            raise UsageError(
                f"module {name} returns {type(output).__name__}, not a tensor: choose a module inside it for features"
            )
        count = sum(key.partition("#")[0] == name for key in found)
        found[f"{name}#{count + 1}" if count else name] = output

    return keep


def _matching(network: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    modules = {name: module for name, module in network.named_modules() if name}
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in modules):
            raise UsageError(f"no module of the network has a name like {pattern!r}: {suggest(pattern, modules)}")
    return {name: module for name, module in modules.items() if any(_matches(name, pattern) for pattern in patterns)}


def _matches(name: str, pattern: str) -> bool:
    """Return whether a dotted name matches a pattern part by part, so that `*` stands for no module inside another."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
