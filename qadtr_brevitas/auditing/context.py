"""What the checks of one audit share: images, places, starts, and the attacks that several checks look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.attacks.shapes import side_for_area
from qadtr_brevitas.auditing.audited_model import AuditedModel
from qadtr_brevitas.auditing.losses import LogitLoss, cross_entropy
from qadtr_brevitas.auditing.profile import AuditProfile
from qadtr_brevitas.auditing.search import STEP_SIZE, AttackedImages, SearchTrace, search
from qadtr_brevitas.core.seeding import generator

PATCH_AREA = 1 / 16
"""The share of the pixels that a patch covers: 8x8 of 32x32."""

VOTES = 5
"""Outputs of a random network that decide, by majority, whether an image is classified correctly."""

FORWARDS, RANDOM_ABOVE = 5, 1e-4
"""Forward passes on one batch, and the difference of outputs of unit length above which a network counts as random."""

FEWEST_IMAGES = 20
"""Fewer images than this show nothing: half of them could change without being more than noise."""

_IMAGES_TRIED = 64
"""Images on which outputs are compared."""


@dataclass
class AuditContext:
    """One model at one precision under audit.

    Attacks that more than one check looks at are made once, when they are first asked for. All results are boolean (n,)
    on the CPU, over the n images that are classified correctly: True where an attack broke the image.

    Args:
        audited: the model, and what its attacker has besides.
        profile: sizes of the attacks.
        images: all images of the audit, (N, C, H, W) in [0, 1].
        labels: (N,), their true classes.
        seed: decides places and starts.
        batch_size: images in one pass.
    """

    audited: AuditedModel
    profile: AuditProfile
    images: Tensor
    labels: Tensor
    seed: int
    batch_size: int
    _broken: list[Tensor] = field(default_factory=list[Tensor])

    @cached_property
    def difference(self) -> float:
        """Largest difference between the outputs of several forward passes on the same images, of unit length."""
        with torch.no_grad():
            outputs = [self.audited.logits(self.images[:_IMAGES_TRIED]) for _ in range(FORWARDS)]
        scaled = torch.stack([normalize(output.flatten().nan_to_num(), dim=0) for output in outputs])
        return (scaled - scaled[0]).abs().max().item()

    @property
    def is_random(self) -> bool:
        """Whether the network gives other outputs for the same images each time."""
        return self.difference > RANDOM_ABOVE

    @cached_property
    def correct(self) -> Tensor:
        """(N,) the images that are classified correctly."""
        return ~self.is_wrong(self.images, self.labels)

    @cached_property
    def attacked(self) -> AttackedImages:
        """The n images that are classified correctly, with the places of all patches."""
        corners = self.corners(self.patch_size)
        return AttackedImages(self.images[self.correct], self.labels[self.correct], corners)

    def __len__(self) -> int:
        return int(self.correct.sum())

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.shape[-2], self.images.shape[-1]

    @cached_property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of the patches."""
        side = side_for_area(PATCH_AREA, self.image_size)
        return side, side

    def corners(self, size: tuple[int, int]) -> Tensor:
        """Return places (n, 2) of patches of any size: the same share of the way from one border to the other."""
        unit = torch.rand(len(self.images), 2, generator=self.generator("places"), dtype=torch.float64)
        room = torch.tensor([whole - part + 1 for whole, part in zip(self.image_size, size, strict=True)])
        return (unit * room).long().to(self.images.device)[self.correct]

    def start(self, restart: int = 0, size: tuple[int, int] | None = None) -> Tensor:
        """Return patches (n, C, h, w) of uniform noise."""
        height, width = size or self.patch_size
        draws = self.generator("start", restart, height)
        noise = torch.rand(len(self.images), self.images.shape[1], height, width, generator=draws)
        return noise.to(self.images.device)[self.correct]

    def generator(self, *purpose: int | str) -> torch.Generator:
        """Return random numbers for one purpose, the same at every precision."""
        return generator(self.seed, "audit", *purpose)

    def search(
        self,
        model: Model,
        *,
        steps: int,
        loss: LogitLoss = cross_entropy,
        attacked: AttackedImages | None = None,
        start: Tensor | None = None,
        marks: tuple[int, ...] = (),
        step_size: float = STEP_SIZE,
    ) -> SearchTrace:
        """Search patches for all images with gradients of a model, a batch at a time.

        Args:
            model: where the gradients come from.
            steps: forward and backward passes.
            loss: what is descended.
            attacked: images and places; None for all that are classified correctly, at their places.
            start: patches to start from; None for the first start.
            marks: numbers of steps after which to record the best patches.
            step_size: size of a step, in pixel values.
        """
        attacked, start = attacked or self.attacked, self.start() if start is None else start
        return _joined(
            [
                search(
                    model,
                    attacked.subset(chunk),
                    start[chunk],
                    steps=steps,
                    loss=loss,
                    marks=marks,
                    step_size=step_size,
                )
                for chunk in self.chunks(len(start))
            ]
        )

    def record_broken(self, wrong: Tensor, index: Tensor | None = None) -> Tensor:
        """Record the images that an attack broke, which count for the worst case, and return them as (n,).

        Args:
            wrong: (m,) whether it broke them.
            index: (m,) their numbers; None for all n in order.
        """
        broken = torch.zeros(len(self), dtype=torch.bool)
        broken[slice(None) if index is None else index] = wrong.cpu()
        self._broken.append(broken)
        return broken

    def broken_by(self, patches: Tensor) -> Tensor:
        """Return the images that patches (n, C, h, w) at their places break, and record them."""
        return self.record_broken(self.is_wrong(self.attacked.with_patches(patches), self.attacked.labels))

    def broken_with_gradients_of(
        self, model: Model, *, loss: LogitLoss = cross_entropy, attacked: AttackedImages | None = None
    ) -> Tensor:
        """Return the images broken by patches of the compared number of steps, with gradients of any model."""
        steps = self.profile.compared_steps
        return self.broken_by(self.search(model, steps=steps, loss=loss, attacked=attacked).best[steps])

    @cached_property
    def longest(self) -> SearchTrace:
        """The longest white-box attack, with its best patches after k, 2k and 4k steps."""
        k = self.profile.steps
        return self.search(self.audited.logits, steps=4 * k, marks=(self.profile.compared_steps, k, 2 * k))

    @cached_property
    def broken_after(self) -> dict[int, Tensor]:
        """The images that the longest attack breaks, by its steps."""
        return {steps: self.broken_by(patches) for steps, patches in self.longest.best.items()}

    @property
    def baseline(self) -> Tensor:
        """The images that the white-box attack breaks in the steps that the attacks compared with it have."""
        return self.broken_after[self.profile.compared_steps]

    @property
    def broken_by_longest(self) -> Tensor:
        """The images that the longest attack breaks."""
        return self.broken_after[4 * self.profile.steps]

    def broken_by_restart(self, restart: int, index: Tensor | None = None) -> Tensor:
        """Return the images that k steps from another start break, of all or of those numbered in `index`."""
        k, index = self.profile.steps, torch.arange(len(self)) if index is None else index
        there = index.to(self.images.device)
        attacked, start = self.attacked.subset(there), self.start(restart)[there]
        patches = self.search(self.audited.logits, steps=k, attacked=attacked, start=start).best[k]
        return self.record_broken(self.is_wrong(attacked.with_patches(patches), attacked.labels), index)

    @cached_property
    def broken_by_restarts(self) -> Tensor:
        """The images that any of several attacks of k steps breaks."""
        others = [self.broken_by_restart(restart) for restart in range(1, self.profile.restarts)]
        return torch.stack([self.broken_after[self.profile.steps], *others]).any(0)

    @cached_property
    def broken_by_white_box(self) -> Tensor:
        """The images that the longest attack or one of the restarts breaks."""
        return self.broken_by_longest | self.broken_by_restarts

    @cached_property
    def broken_by_transfer(self) -> dict[str, Tensor]:
        """The images broken by patches made elsewhere: at other precisions, on surrogates, on the undefended twin."""
        sources = self.audited.other_precisions | self.audited.other_networks()
        return {f"from {name}": self.broken_with_gradients_of(model) for name, model in sources.items()}

    @property
    def broken_by_any(self) -> Tensor:
        """The images that any attack has broken so far."""
        return torch.stack([self.broken_by_white_box, *self._broken]).any(0)

    def is_wrong(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return (m,) whether images (m, C, H, W) are classified wrongly, by most outputs of a random network."""
        draws = VOTES if self.is_random else 1
        wrong = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
        with torch.no_grad():
            for chunk in self.chunks(len(labels)):
                for _ in range(draws):
                    wrong[chunk] += self.audited.logits(images[chunk]).argmax(1) != labels[chunk]
        return 2 * wrong > draws

    def chunks(self, count: int) -> Iterator[Tensor]:
        """Yield the numbers of `count` images, a batch at a time."""
        yield from torch.arange(count, device=self.images.device).split(self.batch_size)


def predictions(model: Model, images: Tensor, *, batch_size: int) -> Tensor:
    """Return the classes (N,) that a model predicts for images (N, C, H, W)."""
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch in images.split(batch_size)])


def _joined(traces: list[SearchTrace]) -> SearchTrace:
    """Join the traces of batches of images."""
    return SearchTrace(
        {mark: torch.cat([trace.best[mark] for trace in traces]) for mark in traces[0].best},
        torch.cat([trace.last for trace in traces]),
        torch.cat([trace.losses for trace in traces], dim=1),
        torch.cat([trace.zero for trace in traces], dim=1),
        torch.cat([trace.not_finite for trace in traces], dim=1),
    )
