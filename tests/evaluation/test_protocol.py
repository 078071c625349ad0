"""The unseen-patch protocol: each kind differs in one thing from what was seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qadtr_brevitas.attacks.a_qapa import AQapa
from qadtr_brevitas.attacks.dpr import Dpr
from qadtr_brevitas.attacks.gap import Gap
from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.core.precision import Precision, parse_precisions
from qadtr_brevitas.evaluation.craft import CraftSetup
from qadtr_brevitas.evaluation.unseen import craft_unseen, left_out_bits, other_targets, unseen_patches
from tests.evaluation.fakes import coded_split, reader


def test_the_kinds_and_their_sizes() -> None:
    found = {kind.name: kind for kind in unseen_patches(Lavan(size=8, steps=7, target=4), 32)}
    assert list(found) == ["6x6", "10x10", "12x12", "disc", "dpr", "other-target", "gap", "left-out-bits"]
    assert [found[name].attack.size for name in ("6x6", "10x10", "12x12", "dpr", "other-target", "gap")] == [
        6, 10, 12, 8, 8, 8,
    ]  # fmt: skip
    assert {type(kind.attack) for kind in found.values()} == {Lavan, Dpr, Gap}
    assert [kind.name for kind in found.values() if kind.other_targets] == ["other-target"]
    assert [kind.name for kind in found.values() if kind.left_out_bits] == ["left-out-bits"]


def test_the_budget_is_that_of_the_seen_patch() -> None:
    for kind in unseen_patches(Lavan(size=8, steps=7, batch_size=5, loss="margin"), 32):
        assert (kind.attack.steps, kind.attack.batch_size, kind.attack.loss) == (7, 5, "margin")


def test_shapes_cover_as_many_pixels_as_the_seen_square() -> None:
    kinds = {kind.name: kind.attack for kind in unseen_patches(Lavan(size=8), 32)}
    assert abs(int(kinds["disc"].mask((32, 32)).sum()) - 64) <= 8
    assert kinds["gap"].shape == "square"


def test_sizes_grow_with_the_image() -> None:
    kinds = {kind.name: kind.attack for kind in unseen_patches(Lavan(size=56), 224)}
    assert [kinds[name].size for name in ("6x6", "10x10", "12x12", "dpr")] == [42, 70, 84, 56]


def test_the_other_family_of_gap_is_lavan() -> None:
    assert type(unseen_patches(Gap(size=8), 32)[6].attack) is Lavan
    with pytest.raises(UsageError, match=r"lavan, gap, dpr.*a-qapa"):
        unseen_patches(AQapa(), 32)


@plugin
class Unregistered(Lavan):
    pass


def test_attack_that_is_not_registered_is_refused_by_its_class() -> None:
    with pytest.raises(UsageError, match=r"lavan, gap, dpr.*Unregistered"):
        unseen_patches(Unregistered(size=8), 32)


def test_model_in_memory_is_refused_because_it_cannot_be_converted_again(tmp_path: Path) -> None:
    split = coded_split()
    setup = CraftSetup(train=split, held_out=split, output=tmp_path, data={"name": "coded"})
    with pytest.raises(UsageError, match=r"reader.*memory.*save"):
        craft_unseen(replace(reader(), path=""), Lavan(size=2), setup, targets=[0])
    assert not list(tmp_path.iterdir())


def test_other_targets_are_none_of_those_seen() -> None:
    assert other_targets((0, 1, 2), 10) == (3, 4, 5)
    assert other_targets((4,), 10) == (0,)
    assert other_targets((None,), 10) == (0,)
    assert other_targets((0, 1, 2), 5) == (3, 4)
    with pytest.raises(UsageError, match="all 3 classes are aimed at already"):
        other_targets((0, 1, 2), 3)


def test_left_out_bits_were_not_trained() -> None:
    assert left_out_bits(parse_precisions([32, 8, 5, 4, 2])) == Precision(3, 3)
    assert left_out_bits(parse_precisions([3])) == Precision(6, 6)
    with pytest.raises(UsageError, match="there is none that was left out"):
        left_out_bits(parse_precisions(range(2, 17)))
