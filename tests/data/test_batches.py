"""Images and labels are read from every form that PyTorch programs have them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.data.batches import ImageBatches, read_split
from qadtr_brevitas.data.split import Split

COUNT, CLASSES = 10, 3
PIXELS = torch.arange(COUNT * 3 * 4 * 4).remainder(256).to(torch.uint8).view(COUNT, 3, 4, 4)
LABELS = torch.arange(COUNT) % CLASSES


def as_float() -> Tensor:
    return PIXELS.float() / 255


def one_pass() -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(as_float().split(4), LABELS.split(4), strict=True)


class Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return as_float()[index], int(LABELS[index])


LABELED: dict[str, Callable[[], Any]] = {
    "DataLoader": lambda: DataLoader(TensorDataset(as_float(), LABELS), batch_size=4),
    "dataset": Pictures,
    "list of pairs": lambda: list(one_pass()),
    "list of lists": lambda: [list(pair) for pair in one_pass()],
    "generator": one_pass,
    "one pair": lambda: (as_float(), LABELS),
    "bytes": lambda: (PIXELS, LABELS),
    "mappings": lambda: [{"image": images, "label": labels} for images, labels in one_pass()],
    "Split": lambda: Split(PIXELS, LABELS, ("a", "b", "c")),
}
UNLABELED: dict[str, Callable[[], Any]] = {
    "tensor": as_float,
    "list of tensors": lambda: list(as_float().split(4)),
    "two tensors of images": lambda: list(as_float().split(5)),
    "DataLoader of images": lambda: DataLoader(as_float(), batch_size=4),
}


@pytest.mark.parametrize("form", LABELED)
def test_labeled_images_become_a_split(form: str) -> None:
    split = read_split(LABELED[form](), classes=CLASSES)
    assert torch.equal(split.images, PIXELS)
    assert torch.equal(split.labels, LABELS)


@pytest.mark.parametrize("form", [*LABELED, *UNLABELED])
def test_images_can_be_looked_at_several_times(form: str) -> None:
    batches = ImageBatches((LABELED | UNLABELED)[form]())
    for _ in range(2):
        seen = list(batches)
        assert len(seen) == len(batches)
        assert torch.equal(torch.cat(seen), as_float())


@pytest.mark.parametrize(
    ("loader", "facts"),
    [
        ([], ["no images"]),
        ([as_float()], ["batch 0", "no labels"]),
        ([(as_float(), LABELS + 1)], ["1 to 3", "0 to 2"]),
        ([(as_float(), LABELS.float())], ["float32", "integer"]),
        ([(as_float(), LABELS[:3])], ["(3,)", "10 images"]),
        ([(as_float() * 4 - 2, LABELS)], ["-2", "Normalize"]),
        ([(as_float()[0], LABELS)], ["(3, 4, 4)", "(N, C, H, W)"]),
        ([("cat", LABELS)], ["tuple", "tensors of images"]),
        ([(PIXELS.int(), LABELS)], ["int32", "uint8"]),
    ],
)
def test_what_is_wrong_with_a_loader_is_said(loader: Any, facts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read_split(loader, classes=CLASSES)
    assert all(fact in str(caught.value) for fact in facts), caught.value
