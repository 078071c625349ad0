"""What all checks of one audit share: images, places, starts, and the attacks that more than one of them looks at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.attacks.shapes import side_for_area
from qadtr_brevitas.auditing.finding import Profile
from qadtr_brevitas.auditing.search import STEP_SIZE, Objective, PatchedImages, SearchTrace, cross_entropy, search
from qadtr_brevitas.auditing.victim import AuditedModel
from qadtr_brevitas.core.seeding import generator

PATCH_SHARE = 1 / 16
"""The share of the pixels that a patch covers: 8x8 of 32x32."""

JUDGEMENTS = 5
"""Outputs of a random network that decide, by majority, whether an image is classified correctly."""

FORWARDS, RANDOM_ABOVE = 5, 1e-4
"""Forwards on one batch, and the difference of outputs of unit length above which a network counts as random."""

_BATCH_TRIED = 64


@dataclass
class AuditContext:
    """One model at one precision under audit.

    Args:
        victim: the model.
        profile: sizes of the attacks.
        batch: all images of the audit, (N, 3, H, W) in [0, 1].
        batch_labels: (N,).
        seed: decides places and starts.
        batch_size: images in one pass.
    """

    victim: AuditedModel
    profile: Profile
    batch: Tensor
    batch_labels: Tensor
    seed: int
    batch_size: int
    broken: list[Tensor] = field(default_factory=list[Tensor])

    @cached_property
    def difference(self) -> float:
        """Largest difference between the outputs of several forwards on the same images, scaled to unit length."""
        with torch.no_grad():
            outputs = [self.victim.logits(self.batch[:_BATCH_TRIED]) for _ in range(FORWARDS)]
        scaled = torch.stack([normalize(output.flatten().nan_to_num(), dim=0) for output in outputs])
        return (scaled - scaled[0]).abs().max().item()

    @property
    def is_random(self) -> bool:
        """Whether the network answers differently each time."""
        return self.difference > RANDOM_ABOVE

    @cached_property
    def correct(self) -> Tensor:
        """(N,) the images of the batch that are classified correctly."""
        return ~self.is_wrong(self.batch, self.batch_labels)

    @cached_property
    def scene(self) -> PatchedImages:
        """The images that are classified correctly, with the places of all patches."""
        corners = self.corners(self.size)
        return PatchedImages(self.batch[self.correct], self.batch_labels[self.correct], corners)

    def __len__(self) -> int:
        return int(self.correct.sum())

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.batch.shape[-2], self.batch.shape[-1]

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of the patches."""
        side = side_for_area(PATCH_SHARE, self.image_size)
        return side, side

    def corners(self, size: tuple[int, int]) -> Tensor:
        """(n, 2) places of patches of any size: the same share of the way from one border to the other."""
        unit = torch.rand(len(self.batch), 2, generator=self.generator("places"), dtype=torch.float64)
        room = torch.tensor([whole - part + 1 for whole, part in zip(self.image_size, size, strict=True)])
        return (unit * room).long().to(self.batch.device)[self.correct]

    def start(self, restart: int = 0, size: tuple[int, int] | None = None) -> Tensor:
        """(n, 3, h, w) patches of uniform noise."""
        height, width = size or self.size
        noise = torch.rand(len(self.batch), 3, height, width, generator=self.generator("start", restart, height))
        return noise.to(self.batch.device)[self.correct]

    def generator(self, *purpose: int | str) -> torch.Generator:
        """Random numbers for one purpose, the same at every precision."""
        return generator(self.seed, "audit", *purpose)

    def search(
        self,
        model: Model,
        *,
        steps: int,
        objective: Objective = cross_entropy,
        scene: PatchedImages | None = None,
        start: Tensor | None = None,
        marks: tuple[int, ...] = (),
        step_size: float = STEP_SIZE,
    ) -> SearchTrace:
        """Searches patches for all images with gradients of a model, a batch at a time.

        Args:
            model: where the gradients come from.
            steps: forward and backward passes.
            objective: what is descended.
            scene: None for all images at their places.
            start: patches to start from; None for the first start.
            marks: numbers of steps after which to note the best patches.
            step_size: of a step, in pixel values.
        """
        scene, start = scene or self.scene, self.start() if start is None else start
        return _joined(
            [
                search(
                    model,
                    scene.only(chunk),
                    start[chunk],
                    steps=steps,
                    objective=objective,
                    marks=marks,
                    step_size=step_size,
                )
                for chunk in self._chunks(len(start))
            ]
        )

    def note(self, wrong: Tensor, index: Tensor | None = None) -> Tensor:
        """(n,) the images that an attack broke, which count for the worst case, on the CPU.

        Args:
            wrong: (m,) whether it broke them.
            index: (m,) their numbers; None for all in order.
        """
        found = torch.zeros(len(self), dtype=torch.bool)
        found[slice(None) if index is None else index] = wrong.cpu()
        self.broken.append(found)
        return found

    def judge(self, patches: Tensor) -> Tensor:
        """(n,) the images that patches (n, 3, h, w) at their places break, on the CPU."""
        return self.note(self.is_wrong(self.scene.put(patches), self.scene.labels))

    def attack(
        self, model: Model, *, objective: Objective = cross_entropy, scene: PatchedImages | None = None
    ) -> Tensor:
        """(n,) the images broken by patches of the compared number of steps, with gradients of any model."""
        steps = self.profile.compared_steps
        return self.judge(self.search(model, steps=steps, objective=objective, scene=scene).best[steps])

    @cached_property
    def longest(self) -> SearchTrace:
        """The longest white-box attack, with its best patches after k, 2k and 4k steps."""
        k = self.profile.steps
        return self.search(self.victim.logits, steps=4 * k, marks=(self.profile.compared_steps, k, 2 * k))

    @cached_property
    def after(self) -> dict[int, Tensor]:
        """(n,) the images that the longest attack breaks, by its steps."""
        return {steps: self.judge(patches) for steps, patches in self.longest.best.items()}

    @property
    def compared(self) -> Tensor:
        """(n,) the images that the white-box attack breaks in the steps that the other attacks have."""
        return self.after[self.profile.compared_steps]

    @property
    def longest_breaks(self) -> Tensor:
        """(n,) the images that the longest attack breaks."""
        return self.after[4 * self.profile.steps]

    def restarted(self, restart: int, index: Tensor | None = None) -> Tensor:
        """(n,) the images that k steps from another start break, of all or of those numbered in `index`."""
        k, index = self.profile.steps, torch.arange(len(self)) if index is None else index
        there = index.to(self.batch.device)
        scene = self.scene.only(there)
        patches = self.search(self.victim.logits, steps=k, scene=scene, start=self.start(restart)[there]).best[k]
        return self.note(self.is_wrong(scene.put(patches), scene.labels), index)

    @cached_property
    def restarts_break(self) -> Tensor:
        """(n,) the images that any of several attacks of k steps breaks."""
        others = [self.restarted(restart) for restart in range(1, self.profile.restarts)]
        return torch.stack([self.after[self.profile.steps], *others]).any(0)

    @cached_property
    def white_box(self) -> Tensor:
        """(n,) the images that the longest attack or one of the restarts breaks."""
        return self.longest_breaks | self.restarts_break

    @cached_property
    def transfers(self) -> dict[str, Tensor]:
        """(n,) the images broken by patches made elsewhere: at other precisions, on surrogates, on the twin."""
        sources = self.victim.others | self.victim.sources()
        return {f"from {name}": self.attack(model) for name, model in sources.items()}

    @property
    def worst_case(self) -> Tensor:
        """(n,) the images that any attack broke so far."""
        return torch.stack([self.white_box, *self.broken]).any(0)

    def is_wrong(self, images: Tensor, labels: Tensor) -> Tensor:
        """(N,) whether images (N, 3, H, W) are classified wrongly, by most of the outputs of a random network."""
        draws = JUDGEMENTS if self.is_random else 1
        wrong = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
        with torch.no_grad():
            for chunk in self._chunks(len(labels)):
                for _ in range(draws):
                    wrong[chunk] += self.victim.logits(images[chunk]).argmax(1) != labels[chunk]
        return 2 * wrong > draws

    def _chunks(self, count: int) -> Iterator[Tensor]:
        yield from torch.arange(count, device=self.batch.device).split(self.batch_size)


def _joined(traces: list[SearchTrace]) -> SearchTrace:
    return SearchTrace(
        {mark: torch.cat([trace.best[mark] for trace in traces]) for mark in traces[0].best},
        torch.cat([trace.last for trace in traces]),
        torch.cat([trace.losses for trace in traces], dim=1),
        torch.cat([trace.zero for trace in traces], dim=1),
        torch.cat([trace.broken for trace in traces], dim=1),
    )
