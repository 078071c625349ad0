from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import PatchAttack, TargetedAttack
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.attacks.random_patch import RandomPatch
from qadtr_brevitas.core.errors import CheckpointError, DataError, UsageError
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.craft import CraftedPatch, CraftSetup, craft, divide_for_crafting
from qadtr_brevitas.evaluation.entries import LoadedModel, NamedPatch
from qadtr_brevitas.quant.inference import mode_name
from qadtr_brevitas.quant.switch import switch_of
from tests.evaluation.fakes import Reader, coded_split, reader


class Killed(Exception):
    pass


@dataclass(frozen=True)
class White(PatchAttack, TargetedAttack):
    """An attack that always finds the white patch; it notes what it was asked and can be killed."""

    target: int | None = 0
    side: int = 2
    strength: int = 1

    def mask(self, image_size: tuple[int, int]) -> Tensor:
        return torch.ones(self.side, self.side, dtype=torch.bool)

    def fit(self, model: Any, images: Tensor, labels: Tensor, **settings: Any) -> Patch:
        LOG.append((self.target, settings["seed"]))
        if len(LOG) > LIMIT:
            raise Killed
        settings["progress"](1, 2, "half")
        meta = {"attack": "white", "settings": {"side": self.side}, "target": self.target}
        return Patch(texture=torch.ones(3, self.side, self.side), mask=self.mask((8, 8)), meta=meta)


LOG: list[tuple[int | None, int]] = []
LIMIT = 100


@pytest.fixture(autouse=True)
def empty_log() -> None:
    LOG.clear()


def make(output: Path, attack: Any = None, loaded: LoadedModel | None = None, **settings: Any) -> list[CraftedPatch]:
    train, held_out = coded_split().divide(20, seed=0)
    chosen: dict[str, Any] = {"progress": lambda done, total, note: None, **settings}
    aims = {key: chosen.pop(key) for key in ("precisions", "targets") if key in chosen}
    setup = CraftSetup(train=train, held_out=held_out, output=output, data={"name": "coded"}, **chosen)
    return craft(loaded or reader(), attack or White(), setup, name="white", **aims)


def test_norms_are_folded_while_a_patch_is_made_and_no_longer(tmp_path: Path) -> None:
    loaded, folded = reader(), []
    switch = switch_of(loaded.model)

    class Spy(White):
        def fit(self, *args: Any, **settings: Any) -> Patch:
            folded.append(switch.folding is not None)
            return super().fit(*args, **settings)

    make(tmp_path, Spy(), loaded, targets=[2])
    assert folded == [True, True]
    assert switch.folding is None


def test_a_patch_for_each_precision_and_target(tmp_path: Path) -> None:
    made = make(tmp_path, targets=[2, 1, None])
    assert [patch.path.name for patch in made] == [
        f"white-2x2-{bits}bit-{aim}.safetensors" for bits in (8, 4) for aim in ("target2", "target1", "untargeted")
    ]
    assert not any(patch.kept for patch in made)
    assert all(patch.path.with_suffix(".png").exists() for patch in made)
    assert len({seed for _, seed in LOG}) == 6
    # Held-out images: five of each class; those of the target class do not count.
    assert [(patch.held_out.count, patch.held_out.n) for patch in made[:3]] == [(15, 15), (0, 15), (15, 20)]


def test_patch_knows_where_it_comes_from(tmp_path: Path) -> None:
    made = make(tmp_path, precisions=[4], targets=[2])
    facts = NamedPatch("patch", Patch.load(made[0].path)).facts
    assert facts.source is not None
    assert facts.source.model_dump() == {"name": "reader", "fingerprint": "reader-weights", "precision": "4"}
    assert (facts.attack, facts.target, facts.settings) == ("white", 2, {"side": 2})
    meta = Patch.load(made[0].path).meta
    assert (meta["data"], meta["train_images"], meta["held_out_images"]) == ({"name": "coded"}, 20, 20)


def test_mean_over_precisions_has_a_name_and_a_stream_of_its_own(tmp_path: Path) -> None:
    made = make(tmp_path, precisions=["8", "4+8"], targets=[2])
    assert [patch.path.name for patch in made] == [
        "white-2x2-8bit-target2.safetensors",
        "white-2x2-8+4bit-target2.safetensors",
    ]
    assert [mode_name(patch.source) for patch in made] == ["8", "8+4"]
    assert len({seed for _, seed in LOG}) == 2
    facts = NamedPatch("patch", Patch.load(made[1].path)).facts
    assert facts.source is not None
    assert facts.source.precision == "8+4"
    # Fooled at 8 bit alone, the mean of the logits is a tie, which argmax gives to the lower class.
    half = make(tmp_path / "half", loaded=reader(model=Reader(fooled_at=(8,))), precisions=["8+4"], targets=[2])
    assert half[0].held_out.count == 5
    assert [patch.kept for patch in make(tmp_path, precisions=["4+8"], targets=[2])] == [True]
    with pytest.raises(UsageError, match="no precision 5: it was converted for 8, 4"):
        make(tmp_path, precisions=["8+5"])


class Asks(White):
    """Notes what the model says to images with a white patch, with gradients and without."""

    def fit(self, model: Any, images: Tensor, labels: Tensor, **settings: Any) -> Patch:
        white = images.float() / 255
        white[:, :, :2, :2] = 1
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                ANSWERS[enabled] = [model(white).argmax(1) for _ in range(3)]
        return super().fit(model, images, labels, **settings)


ANSWERS: dict[bool, list[Tensor]] = {}


def test_random_precisions_are_drawn_alike_for_every_texture_that_is_scored(tmp_path: Path) -> None:
    make(tmp_path, Asks(), reader(model=Reader(fooled_at=(8,))), precisions=["random(8+4)"], targets=[2])
    assert all(torch.equal(answer, ANSWERS[False][0]) for answer in ANSWERS[False])
    assert not torch.equal(ANSWERS[True][0], ANSWERS[True][1])


def test_killed_run_keeps_finished_patches_and_makes_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 3)
    with pytest.raises(Killed):
        make(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    LOG.clear()
    again = make(tmp_path)
    assert [patch.kept for patch in again] == [True] * 3 + [False] * 3
    assert len(LOG) == 3


def test_patch_made_otherwise_is_not_overwritten(tmp_path: Path) -> None:
    made = make(tmp_path, precisions=[4], targets=[1])
    before = made[0].path.read_bytes()
    for changed in ({"seed": 1}, {"attack": White(side=2, strength=2)}, {"loaded": reader(fingerprint="retrained")}):
        with pytest.raises(UsageError, match=r"already exists.*--output"):
            make(tmp_path, precisions=[4], targets=[1], **changed)
    assert made[0].path.read_bytes() == before


def test_damaged_patch_is_not_overwritten(tmp_path: Path) -> None:
    path = make(tmp_path, precisions=[4], targets=[1])[0].path
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="make the patch again"):
        make(tmp_path, precisions=[4], targets=[1])


def test_defaults_and_limits_of_targets(tmp_path: Path) -> None:
    assert [patch.target for patch in make(tmp_path / "a", precisions=[4])] == [0, 1, 2]
    with pytest.raises(UsageError, match=r"target class 4 is out of range.*0 to 3"):
        make(tmp_path / "b", targets=[4])
    with pytest.raises(UsageError, match="no precision 5: it was converted for 8, 4"):
        make(tmp_path / "b", precisions=[5])


def test_attack_without_a_target_makes_one_patch_a_precision(tmp_path: Path) -> None:
    made = make(tmp_path, RandomPatch(size=3))
    assert [patch.path.stem for patch in made] == ["white-3x3-8bit-untargeted", "white-3x3-4bit-untargeted"]


def test_progress_counts_all_patches(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []

    def report(done: int, total: int, note: str = "") -> None:
        seen.append((done, total, note))

    make(tmp_path, precisions=[4], targets=[1, 2], progress=report)
    assert [done / total for done, total, _ in seen] == [0.25, 0.5, 0.75, 1.0]
    assert seen[0][2] == "4 bit, target1 half"


def test_model_and_images_have_to_fit(tmp_path: Path) -> None:
    odd: Split = coded_split(side=9)
    with pytest.raises(DataError, match="choose the data set it was trained on"):
        craft(reader(), White(), CraftSetup(train=odd, held_out=odd, output=tmp_path), name="white")


@dataclass(frozen=True)
class Hopeless(White):
    def fit(self, model: Any, images: Tensor, labels: Tensor, **settings: Any) -> Patch:
        raise DataError("the model classifies no held-out image correctly")


def test_failed_patch_is_named_by_precision_and_target(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^white at 4 bit, target2: the model classifies no"):
        make(tmp_path, Hopeless(), precisions=[4], targets=[2])


def test_images_are_divided_into_those_to_make_and_those_to_choose_patches_on() -> None:
    split = coded_split(40)
    train, held_out = divide_for_crafting(split, seed=3)
    assert (len(train), len(held_out)) == (32, 8)
    again = divide_for_crafting(split, seed=3)
    assert torch.equal(train.labels, again[0].labels)
    assert torch.equal(held_out.labels.bincount(), torch.tensor([2, 2, 2, 2]))


def test_division_has_limits_and_takes_numbers() -> None:
    split = coded_split(40)
    assert [len(part) for part in divide_for_crafting(split, seed=0, max_train=12, max_held_out=4)] == [12, 4]
    assert [len(part) for part in divide_for_crafting(split, seed=0, train=20, held_out=20)] == [20, 20]
    with pytest.raises(UsageError, match=r"30 training.*20 held-out.*40.*--train-images"):
        divide_for_crafting(split, seed=0, train=30, held_out=20)


def test_parts_have_no_image_in_common() -> None:
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 2, 2).contiguous()
    split = Split(images, torch.arange(40) % 4, tuple("abcd"))
    train, held_out = divide_for_crafting(split, seed=0)
    parts = [set(part.images[:, 0, 0, 0].tolist()) for part in (train, held_out)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(range(40))
