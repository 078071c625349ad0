"""What a comparison refuses: no file that only rounds otherwise, and any that computes something else."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.errors import ExportError
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.exporting.rounding import rounded_otherwise
from qadtr_brevitas.exporting.verify import Agreement, PatchAgreement, check, compare
from qadtr_brevitas.quant import at_precision, freeze
from qadtr_brevitas.quant.model import SwitchableModel
from tests.exporting.networks import loaded, residual

COUNT = 40
SPLIT = Split(
    torch.randint(256, (COUNT, 3, 16, 16), generator=torch.Generator().manual_seed(3), dtype=torch.uint8),
    torch.arange(COUNT) % 4,
    ("a", "b", "c", "d"),
)


@cache
def network() -> SwitchableModel:
    return loaded(residual(), precisions=(32, 8, 4)).model


def agreement_of(exported: nn.Module, bits: int) -> Agreement:
    model = network()
    with at_precision(model, bits), torch.no_grad():
        return compare(model, exported, SPLIT, otherwise=lambda: rounded_otherwise(model))


@pytest.mark.parametrize("bits", [8, 4])
def test_another_order_of_sums_is_accepted(bits: int) -> None:
    class Otherwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = freeze(network(), bits).double()

        def forward(self, images: Tensor) -> Tensor:
            return self.frozen(images.double()).float()

    found = agreement_of(Otherwise(), bits)
    check(found)
    assert found.farther < COUNT / 2


@pytest.mark.parametrize(("bits", "change"), [(8, "weight"), (8, "scale"), (4, "weight"), (4, "scale")])
def test_one_weight_or_one_scale_that_is_off_is_refused(bits: int, change: str) -> None:
    frozen = freeze(network(), bits)
    layer = frozen.net[4].conv1
    with torch.no_grad():
        if change == "weight":
            # One level of 15, or 48 of 255, of which one moves less than rounding does; where nothing is clipped.
            random = torch.Generator().manual_seed(0)
            index = tuple(int(torch.randint(size, (1,), generator=random)) for size in layer.weight.shape)
            step = (1.01 if bits == 4 else 48) * layer.quant_weight().scale[index[0], 0, 0, 0]
            layer.weight[index] -= step * layer.weight[index].sign()
        else:
            levels = 2 ** (bits - 1) - 1
            proxy = frozen.net[2].act_quant.fused_activation_quant_proxy.tensor_quant
            proxy.scaling_impl.value.mul_(1 + 1 / levels)
    found = agreement_of(frozen, bits)
    with pytest.raises(ExportError, match="farther from the network"):
        check(found)
    with pytest.raises(ExportError, match="does not compute"):
        check(found, tolerance=1.0)


def test_a_wrong_freeze_is_found_too() -> None:
    # The comparison is with the switchable model, not with what the file was written from.
    frozen = freeze(network(), 4)
    frozen.std.mul_(1.05)
    with pytest.raises(ExportError, match="does not compute"):
        check(agreement_of(frozen, 4))


def agreement(**changes: object) -> Agreement:
    same = Agreement(
        images=100,
        max_difference=0.01,
        median_difference=0.0,
        largest_logit=10.0,
        moved=1,
        own_difference=0.01,
        own_median=0.0,
        farther=1,
        nearer=1,
        same_class=1.0,
        unexplained=0,
        accuracy=0.9,
        exported_accuracy=0.9,
        patches=(),
    )
    return replace(same, **changes)


def patched(gained: int, lost: int, **changes: object) -> PatchAgreement:
    n, broken = 84, 39
    same = PatchAgreement("p", None, n, broken / n, (broken + gained - lost) / n, gained, lost, 0)
    return replace(same, **changes)


def test_patches_may_differ_by_what_a_paired_test_allows() -> None:
    # 46.4 % against 48.8 %: two of 84 images.
    check(agreement(patches=(patched(0, 2),)))
    check(agreement(patches=(patched(9, 8),)))
    with pytest.raises(ExportError, match="patch p reaches 57"):
        check(agreement(patches=(patched(9, 0),)))
    with pytest.raises(ExportError, match="2 images get another class under it"):
        check(agreement(patches=(patched(1, 1, unexplained=2),)))


def test_what_rounding_alone_moves_as_far_is_allowed() -> None:
    far = {"median_difference": 0.0128, "largest_logit": 0.61}
    with pytest.raises(ExportError, match=r"median image differ by 0\.0128"):
        check(agreement(**far))
    check(agreement(**far, own_median=0.01))
    check(agreement(same_class=0.9))
    with pytest.raises(ExportError, match=r"only 90.0% of the images.*\b10 of the others"):
        check(agreement(same_class=0.9, unexplained=10))
    check(agreement(farther=40, nearer=30))
    for farther, nearer in ((10, 0), (45, 15)):
        with pytest.raises(ExportError, match=f"on {farther} images"):
            check(agreement(farther=farther, nearer=nearer))
        check(agreement(farther=farther, nearer=nearer), exact=False)


def test_images_are_counted_as_they_differ() -> None:
    def own(images: Tensor) -> Tensor:
        return torch.tensor([[3.0, 0.0], [1.0, 0.9], [0.0, 2.0], [0.0, 1.0]])[: len(images)]

    def other(images: Tensor) -> Tensor:
        # The second image lies within rounding, the third does not.
        return torch.tensor([[3.0, 0.0], [0.96, 0.97], [2.0, 0.0], [0.0, 1.0]])[: len(images)]

    split = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), ("a", "b"))
    patch = Patch(texture=torch.ones(3, 2, 2), mask=torch.ones(2, 2, dtype=torch.bool), meta={})

    def unchanged() -> AbstractContextManager[None]:
        return nullcontext()

    found = compare(own, other, split, [("p", patch)], otherwise=unchanged)
    assert (found.moved, found.unexplained, found.farther, found.nearer) == (2, 1, 2, 0)
    assert found.same_class == 0.5
    assert "2 of 4 predictions change" in found.sentence()
    # Only images that both classify correctly without the patch count.
    assert (found.patches[0].gained, found.patches[0].lost, found.patches[0].unexplained) == (0, 0, 1)
