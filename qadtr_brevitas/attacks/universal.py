"""What universal patch attacks share: which images count, restarts, choosing the best, the facts that are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model, Progress
from qadtr_brevitas.attacks.engine import Found, HeldOut, Search, search_texture, start_texture
from qadtr_brevitas.attacks.losses import attack_loss
from qadtr_brevitas.attacks.patch import Patch, versions
from qadtr_brevitas.attacks.patch_fields import SearchFields
from qadtr_brevitas.errors import DataError
from qadtr_brevitas.seeding import generator

Put: TypeAlias = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Puts a texture (3, h, w) on images, at places and with transforms drawn from the generator; differentiable."""


@dataclass(frozen=True, kw_only=True)
class UniversalSearch:
    """A search for one texture that works on all images.

    Args:
        fields: the attack and its settings.
        mask: boolean (h, w), on the device to compute on.
        put: how the texture gets on images.
        seed: the same seed gives the same patch.
        progress: called after every step.
    """

    fields: SearchFields
    mask: Tensor
    put: Put
    seed: int
    progress: Progress | None

    def fit(self, model: Model, images: Tensor, labels: Tensor, *, held_out: tuple[Tensor, Tensor]) -> Patch:
        """Makes the patch; arguments and errors are those of the attack's own `fit`."""
        target = self.fields.target
        judge = HeldOut.select(model, *held_out, target=target, batch_size=self.fields.batch_size)
        if target is not None:
            images, labels = images[labels != target], labels[labels != target]
        if len(images) == 0:
            raise DataError("there are no images to make the patch on but those of the target class: give more images")
        runs = (self._run(model, images, labels, judge, restart) for restart in range(self.fields.restarts))
        best = max(runs, key=lambda found: found.score)
        meta = {
            "attack": self.fields.attack,
            "settings": asdict(self.fields),
            "target": target,
            "seed": self.seed,
            "threat_model": f"universal {'untargeted' if target is None else 'targeted'}",
            "held_out_asr": best.score,
            "versions": versions(),
        }
        place, keep_out = self.fields.place, self.fields.keep_out
        return Patch(texture=best.texture, mask=self.mask, place=place, keep_out=keep_out, meta=meta)

    def _run(self, model: Model, images: Tensor, labels: Tensor, judge: HeldOut, restart: int) -> Found:
        """One search from one start."""
        fields = self.fields
        places = self._stream("places", restart)

        def objective(texture: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            targets = None if fields.target is None else torch.full_like(labels, fields.target)
            return attack_loss(fields.loss, model(self.put(texture, images, places)), labels, targets).mean()

        def score(texture: Tensor) -> float:
            # The same places for every texture of every restart, so that scores compare textures and not luck.
            fixed = self._stream("held-out places")
            return judge.success_rate(
                model, lambda images: self.put(texture, images, fixed), batch_size=fields.batch_size
            )

        def report(step: int, best: float) -> None:
            if self.progress is not None:
                self.progress(restart * fields.steps + step, fields.restarts * fields.steps, f"held-out ASR {best:.1%}")

        start = start_texture(
            fields.init,
            (self.mask.shape[0], self.mask.shape[1]),
            generator=self._stream("start", restart),
        )
        return search_texture(
            start.to(images.device),
            images,
            labels,
            objective=objective,
            score=score,
            search=_search(fields),
            generator=self._stream("batches", restart),
            report=report,
        )

    def _stream(self, *purpose: int | str) -> torch.Generator:
        return generator(self.seed, self.fields.attack, *purpose)


def _search(fields: SearchFields) -> Search:
    return Search(
        steps=fields.steps,
        batch_size=fields.batch_size,
        step_rule=fields.step_rule,
        lr=fields.step_size,
        cosine=fields.cosine,
        check_every=fields.check_every,
    )
