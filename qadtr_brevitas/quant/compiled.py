"""Passes of attacks, forward and back to the images, and those of masked images, through torch.compile.

While weights are frozen, a graph reads quantized weights, norms and levels as tensors (`quant/prepared.py`), so that
one compilation serves all precisions below 32 bit, and one more serves 32 bit. Certificates and defended predictions
take up to thousands of passes for an image, without gradients (`repeating`): below 32 bit their convolutions are those
of integers, where the CPU has exact ones. Other passes run as always: those of other predictions, and of models whose
layers have hooks.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from qadtr_brevitas.core.device import missing_compiler
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant.frozen import version_of
from qadtr_brevitas.quant.model import SwitchableModel
from qadtr_brevitas.quant.prepared import prepare
from qadtr_brevitas.quant.switch import SwitchState
from qadtr_brevitas.quant.tensor_levels import Prepared

# Torch gives up on a function, and runs it eagerly, after so many graphs.
_MOST_GRAPHS = 64
_LENGTH_OF_REASON = 200
_IMAGES_TRIED = 2


def allow_graphs(count: int) -> None:
    """Let torch.compile keep at least so many graphs of one function."""
    # Loaded at its first use, which takes a second.
    config: Any = torch._dynamo.config  # pyright: ignore
    config.recompile_limit = max(config.recompile_limit, count)


def reason_of(failure: Exception) -> str:
    """Return the kind and the first words of an error of torch.compile, on one line."""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:_LENGTH_OF_REASON]}"


def compile_passes(model: nn.Module, *, report: Callable[[str], None] | None = None, backend: str = "inductor") -> None:
    """Let passes of attacks run through torch.compile wherever weights are frozen, in this thread.

    These are passes with gradients to the images, and others within `repeating`.

    Results are those of the model up to float rounding, which may move a value to the next level of a quantizer.
    Torch keeps graphs on disk, so that a later process finds them (`TORCHINDUCTOR_CACHE_DIR`).

    Args:
        model: a switchable model; nothing happens to others.
        report: called with a sentence on each compilation, and on the reason where there is none.
        backend: of torch.compile.
    """
    report = report or (lambda message: None)
    if not isinstance(model, SwitchableModel):
        return
    if backend == "inductor" and (missing := missing_compiler(model.mean.device)):
        report(f"nothing is compiled: {missing}")
        return
    if any(map(_has_hooks, model.modules())):
        report("nothing is compiled: layers of the network have hooks, such as those of quant.feature_clip")
        return
    allow_graphs(_MOST_GRAPHS)
    # Attacks may go back twice, and so need the tensors that a graph would reuse.
    functorch_config.donated_buffer = False
    model.switch.passes = _CompiledPasses(model, report, backend)


@contextmanager
def compiling(model: nn.Module, *, report: Callable[[str], None] | None = None) -> Generator[None]:
    """Compile passes as `compile_passes` does, for the duration of a block in this thread.

    Args:
        model: a switchable model; nothing happens to others.
        report: called with a sentence on each compilation, and on the reason where there is none.
    """
    with ExitStack() as stack:
        if isinstance(model, SwitchableModel):
            stack.enter_context(model.switch.having(passes=model.switch.passes))
            compile_passes(model, report=report)
        yield


@contextmanager
def repeating(model: nn.Module) -> Generator[None]:
    """Let passes without gradients be compiled too inside a block, if those of attacks are (`compile_passes`).

    Args:
        model: any; nothing happens to models that are not switchable.
    """
    with ExitStack() as stack:
        if isinstance(model, SwitchableModel):
            stack.enter_context(model.switch.having(is_repeating=True))
        yield


class _PreparedAt(NamedTuple):
    """Prepared tensors, and what they were made of."""

    frozen: object
    folding: object
    versions: list[int]
    prepared: Prepared

    def is_of(self, now: SwitchState, versions: list[int]) -> bool:
        """Return whether they would be made of the same."""
        return self.frozen is now.frozen and self.folding is now.folding and self.versions == versions


class _CompiledPasses:
    """The compiled form of one model.

    Args:
        model: the model.
        report: called with sentences for people.
        backend: of torch.compile.
    """

    def __init__(self, model: SwitchableModel, report: Callable[[str], None], backend: str) -> None:
        self._model, self._report = model, report
        self._graph = torch.compile(model.logits, backend=backend)
        self._tensors = [*model.parameters(), *model.buffers()]
        # By the precision, and whether gradients are taken.
        self._prepared: dict[tuple[Precision, bool], _PreparedAt] = {}
        self._is_working = True

    def serves(self, images: Tensor) -> bool:
        now = self._model.switch.states.now
        return (
            not (torch.compiler.is_compiling() or torch.jit.is_tracing())
            and self._is_working
            and now.frozen is not None
            and now.observer is None
            and (_takes_gradients(images) or now.is_repeating)
            # Torch compiles a graph of its own for one image.
            and len(images) > 1
            and self._is_plain()
        )

    def __call__(self, images: Tensor) -> Tensor:
        model, now = self._model, self._model.switch.states.now
        arithmetic = nullcontext() if now.folding is None else now.folding.arithmetic(images)
        prepared = self._prepare(now, images)
        with model.switch.having(passes=None, prepared=prepared, frozen=None, folding=None), arithmetic:
            try:
                return self._run(images, now.precision).to(images.dtype)
            except Exception as error:
                failure = error
        with model.switch.having(passes=None):
            logits: Tensor = model(images)
        # Images that the network itself cannot take are no fault of the compiler.
        self._is_working = False
        self._report(f"nothing is compiled: torch.compile fails ({reason_of(failure)})")
        return logits

    def _run(self, images: Tensor, precision: Precision) -> Tensor:
        before, start = graph_count(), time.perf_counter()
        with warnings.catch_warnings():
            # Torch looks at the gradient of its inputs, which patched images do not keep.
            warnings.filterwarnings("ignore", message="The .grad attribute")
            logits = self._graph(_of_any_number(images))
        if graph_count() == before:
            return logits
        if _takes_gradients(images):
            # The way back is compiled when it is first taken; a failure has to show here.
            sample = images.detach().requires_grad_()
            torch.autograd.grad(self._graph(_of_any_number(sample)).sum(), sample)
        made = "of attacks" if _takes_gradients(images) else "without gradients"
        self._report(f"compiled the passes {made} at {precision} bit in {time.perf_counter() - start:.0f} s")
        return logits

    def _prepare(self, now: SwitchState, images: Tensor) -> Prepared:
        versions, key = [version_of(tensor) for tensor in self._tensors], (now.precision, _takes_gradients(images))
        found = self._prepared.get(key)
        if found is None or not found.is_of(now, versions):
            prepared = prepare(self._model, None if _takes_gradients(images) else images[:_IMAGES_TRIED])
            self._prepared[key] = found = _PreparedAt(now.frozen, now.folding, versions, prepared)
        return found.prepared

    def _is_plain(self) -> bool:
        """Return whether no module is in training mode or has hooks, of which a graph would not know later."""
        return not any(module.training or _has_hooks(module) for module in self._model.modules())


def _takes_gradients(images: Tensor) -> bool:
    return images.requires_grad and torch.is_grad_enabled()


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage]


def _of_any_number(images: Tensor) -> Tensor:
    torch._dynamo.maybe_mark_dynamic(images, 0)  # pyright: ignore
    return images


def graph_count() -> int:
    """Return how many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]  # pyright: ignore
