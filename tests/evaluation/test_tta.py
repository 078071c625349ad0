"""Test-time augmentation: its views by hand, and what they cost; that proofs hold is tested with double masking."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.certification import Certification
from qadtr_brevitas.evaluation.tta import TtaKind, averaged
from tests.evaluation.test_patch_cleanser import FILL, SIDE, binary_images, random_model

KINDS: tuple[TtaKind, ...] = ("flip", "shift", "flip-shift")


def views_by_hand(image: Tensor) -> dict[str, Tensor]:
    """Four views of an image (C, H, W), pixel by pixel."""
    height, width = image.shape[1:]
    moved = torch.stack(
        [image[:, max(row - 1, 0), max(column - 1, 0)] for row in range(height) for column in range(width)], dim=1
    ).view_as(image)
    mirrored = [
        torch.stack([one[:, :, width - 1 - column] for column in range(width)], dim=2) for one in (image, moved)
    ]
    return {"itself": image, "mirrored": mirrored[0], "moved": moved, "both": mirrored[1]}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("none", ["itself"]),
        ("flip", ["itself", "mirrored"]),
        ("shift", ["itself", "moved"]),
        ("flip-shift", ["itself", "mirrored", "moved", "both"]),
    ],
)
def test_logits_are_the_mean_over_the_views(kind: TtaKind, names: list[str]) -> None:
    images = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(2 * 5 * 7, 4, generator=torch.Generator().manual_seed(1))

    def model(x: Tensor) -> Tensor:
        return (x.flatten(1) @ weight).tanh()

    found = averaged(model, kind)(images)
    for image, logits in zip(images, found, strict=True):
        views = views_by_hand(image)
        expected = torch.stack([model(views[name][None])[0] for name in names]).mean(dim=0)
        assert torch.allclose(logits, expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_view_counts_as_a_pass(kind: TtaKind) -> None:
    seen = 0

    def model(images: Tensor) -> Tensor:
        nonlocal seen
        seen += len(images)
        return random_model(0)(images)

    against = Certification(2, 3, tta=kind)
    found = against.run(model, binary_images(10), color=FILL.color, batch_size=64)
    assert found.passes is not None
    assert int(found.passes.sum()) == seen
    most = against.passes_to_prove((SIDE, SIDE))
    assert most == against.views * Certification(2, 3).passes_to_prove((SIDE, SIDE))
    assert set(found.passes[found.proved >= 0].tolist()) <= {most}


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(UsageError, match=r"rotate.*flip-shift"):
        Certification(5, tta="rotate")  # pyright: ignore[reportArgumentType]
