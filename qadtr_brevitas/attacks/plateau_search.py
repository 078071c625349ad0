"""APGD for patches: momentum, and steps that are halved where the loss stops falling (Croce & Hein 2020)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Passes
from qadtr_brevitas.attacks.descent import clip_to_pixels, input_gradients
from qadtr_brevitas.attacks.image_streams import ImageStreams
from qadtr_brevitas.attacks.per_image import PatchTask
from qadtr_brevitas.attacks.relocation import AllowedCorners
from qadtr_brevitas.attacks.results import AttackResult

_MOMENTUM = 0.75
_FIRST_SHARE, _LEAST_SHARE, _SHARE_STEP = 0.22, 0.06, 0.03
"""Share of the steps up to the first checkpoint, and how the shares between checkpoints shrink to their least."""
_ENOUGH_PROGRESS = 0.75
_FIRST_STEP = 0.25
"""First step in pixel values."""
_MOVE_EVERY, _REACH = 2, 0.5
"""Steps between two tries to move, and how far the first goes at most, in sides of the patch."""


@dataclass(frozen=True, kw_only=True)
class PlateauSearch:
    """A search of patches by gradient whose steps need no tuning: APGD in the box [0, 1] of pixel values.

    Every step follows the sign of the gradient and keeps a quarter of the step before. At checkpoints, an image whose
    loss fell in less than three of four steps, or did not reach a new minimum since the last checkpoint, goes on from
    its best patch with half the step. Every second step the patch tries to move, and does where that lowers the loss.

    Images that are broken are left out from the next checkpoint on.

    Args:
        task: the images and the goal of the attack.
        allowed: where patches may move; None: they stay.
        steps: gradient steps; each is a forward and a backward pass.
        streams: draw the moves.
    """

    task: PatchTask
    allowed: AllowedCorners | None
    steps: int
    streams: ImageStreams

    @staticmethod
    def passes(steps: int, *, moves: bool) -> Passes:
        """Return the passes for an image, at most."""
        return Passes(1 + steps + (steps // _MOVE_EVERY if moves else 0), steps)

    def run(self, patches: Tensor, corners: Tensor) -> AttackResult:
        """Return the best result of every image, from patches (N, C, h, w) at corners (N, 2)."""
        return _Run(self, patches, corners).result()


# Its fields are changed in place, all by the same index when images are left out.
@dataclass
class _State:
    """Patches on their way, one for each image that is still attacked."""

    patches: Tensor
    before: Tensor
    corners: Tensor
    losses: Tensor
    gradients: Tensor
    step: Tensor
    best_patches: Tensor
    best_corners: Tensor
    best_losses: Tensor
    best_gradients: Tensor
    falls: Tensor
    checked_losses: Tensor
    was_halved: Tensor

    def subset(self, index: Tensor) -> _State:
        """Return the patches of some of the images."""
        return _State(**{name: values[index] for name, values in vars(self).items()})


class _Run:
    """One run of a search, on the images that are not broken yet."""

    def __init__(self, search: PlateauSearch, patches: Tensor, corners: Tensor) -> None:
        self.search, self.task, self.streams = search, search.task, search.streams
        patches, self.left = clip_to_pixels(patches), torch.arange(len(patches), device=patches.device)
        gradients, found = self._assess(patches, corners)
        self.best = found
        self.state = _State(
            patches=patches,
            before=patches,
            corners=corners,
            losses=found.losses,
            gradients=gradients,
            step=torch.full_like(found.losses, _FIRST_STEP),
            best_patches=patches,
            best_corners=corners,
            best_losses=found.losses,
            best_gradients=gradients,
            falls=torch.zeros_like(found.losses),
            checked_losses=found.losses,
            was_halved=torch.zeros_like(found.success),
        )

    def result(self) -> AttackResult:
        """Take all steps, and return the best result of every image."""
        checkpoints = dict(checkpoint_lengths(self.search.steps))
        self._leave_out_broken()
        for number in range(1, self.search.steps + 1):
            if len(self.left) == 0:
                break
            if self.search.allowed is not None and number % _MOVE_EVERY == 0:
                self._move(number)
            self._step(number)
            if number in checkpoints:
                self._check(checkpoints[number])
                self._leave_out_broken()
        return self.best

    def _step(self, number: int) -> None:
        state = self.state
        ahead = clip_to_pixels(state.patches - state.step[:, None, None, None] * state.gradients.sign())
        if number > 1:
            carried = state.patches + _MOMENTUM * (ahead - state.patches)
            ahead = clip_to_pixels(carried + (1 - _MOMENTUM) * (state.patches - state.before))
        state.before, state.patches = state.patches, ahead
        state.gradients, found = self._assess(ahead, state.corners, gradients=number < self.search.steps)
        state.falls += found.losses < state.losses
        state.losses = found.losses
        self._keep(found)

    def _keep(self, found: AttackResult) -> None:
        """Keep a result with the present patches, gradients and corners where it is the best so far."""
        self.best = self.best.index_copy(self.left, found.or_better(self.best.subset(self.left)))
        state, lower = self.state, found.losses < self.state.best_losses
        wide = lower[:, None, None, None]
        state.best_patches = torch.where(wide, state.patches, state.best_patches)
        state.best_gradients = torch.where(wide, state.gradients, state.best_gradients)
        state.best_corners = torch.where(lower[:, None], state.corners, state.best_corners)
        state.best_losses = torch.where(lower, found.losses, state.best_losses)

    def _check(self, length: int) -> None:
        state = self.state
        no_new_best = ~state.was_halved & (state.best_losses >= state.checked_losses)
        halved = (state.falls < _ENOUGH_PROGRESS * length) | no_new_best
        wide = halved[:, None, None, None]
        state.step = torch.where(halved, state.step / 2, state.step)
        state.patches = torch.where(wide, state.best_patches, state.patches)
        state.gradients = torch.where(wide, state.best_gradients, state.gradients)
        state.corners = torch.where(halved[:, None], state.best_corners, state.corners)
        state.losses = torch.where(halved, state.best_losses, state.losses)
        state.was_halved, state.checked_losses = halved, state.best_losses
        state.falls = torch.zeros_like(state.falls)

    @torch.no_grad()
    def _move(self, number: int) -> None:
        """Try another place with the present patches, less and less far, and go there where the loss is lower."""
        state, allowed = self.state, self.search.allowed
        assert allowed is not None
        share = _REACH * (1 - number / self.search.steps)
        rows, columns = (max(1, round(share * side)) for side in self.task.patch_size)
        drawn = [self.streams.integers(-reach, reach + 1, len(state.corners)) for reach in (rows, columns)]
        places = allowed.shifted(state.corners, torch.stack(drawn, 1))
        moved = self.task.subset(self.left).assess(state.patches, places)
        lower = moved.losses < state.losses
        state.corners = torch.where(lower[:, None], places, state.corners)
        state.losses = torch.where(lower, moved.losses, state.losses)
        # The gradient is that of the place before, and is used for one step.
        kept = moved.replace_where(~lower, self.best.subset(self.left))
        self._keep(kept)

    def _leave_out_broken(self) -> None:
        broken = self.best.success[self.left]
        if bool(broken.any()):
            index = (~broken).nonzero().squeeze(1)
            self.left, self.state, self.streams = self.left[index], self.state.subset(index), self.streams.subset(index)

    def _assess(self, patches: Tensor, corners: Tensor, *, gradients: bool = True) -> tuple[Tensor, AttackResult]:
        task = self.task.subset(self.left)
        if not gradients:
            with torch.no_grad():
                return torch.zeros_like(patches), task.assess(patches, corners)
        values = patches.detach().requires_grad_()
        with torch.enable_grad():
            found = task.assess(values, corners)
            (gradient,) = input_gradients(found.losses, [values])
        return gradient, found.detach()


def checkpoint_lengths(steps: int) -> Iterator[tuple[int, int]]:
    """Yield the steps after which progress is checked, each with the number of steps since the one before."""
    share, last_share, done = _FIRST_SHARE, 0.0, 0
    # Rounding errors must not make a whole number larger.
    while (at := math.ceil(share * steps - 1e-9)) < steps:
        yield at, at - done
        done = at
        share, last_share = share + max(share - last_share - _SHARE_STEP, _LEAST_SHARE), share
