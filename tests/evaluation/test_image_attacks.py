from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.attacks.a_qapa import AQapa
from qadtr_brevitas.attacks.base import ImageAttack, IndexedAttack, Passes
from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.attacks.random_patch import RandomPatch
from qadtr_brevitas.attacks.sparse_rs import SparseRs
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import parse_precisions
from qadtr_brevitas.evaluation import NamedAttack, evaluate
from qadtr_brevitas.evaluation.cells import CellStore, ChunkKey
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.grid import read_means
from qadtr_brevitas.evaluation.image_attacks import SourcedAttack
from qadtr_brevitas.evaluation.jobs import Victim
from qadtr_brevitas.evaluation.report import AttackCell, EvaluationReport
from qadtr_brevitas.evaluation.report.markdown import markdown
from qadtr_brevitas.quant.inference import parse_mode
from tests.evaluation.fakes import Reader, Whiten, make_grid, reader
from tests.evaluation.models import CLASSES, SIDE, make_switchable, train_split


@pytest.fixture(autouse=True)
def no_calls() -> Iterator[None]:
    Whiten.calls.clear()
    yield
    Whiten.calls.clear()


WHITEN = NamedAttack("whiten", Whiten())


def run(output: Path, loaded_models: list[LoadedModel] | None = None, **settings: Any) -> EvaluationReport:
    progress, cells = settings.pop("progress", None), settings.pop("cells", ())
    grid = make_grid(loaded_models or [reader()], **{"attacks": [WHITEN], **settings})
    return evaluate(grid, output=output, cells=cells, progress=progress)


def cell(report: EvaluationReport, attack: str, precision: str, model: str = "reader") -> AttackCell:
    where = (model, precision, attack)
    return next(c for c in report.cells if (c.model, c.precision, c.attack) == where)


def test_each_model_and_precision_is_a_source_for_all_victims(tmp_path: Path) -> None:
    # Fooled at 4 bit only: images made at 8 bit are the clean ones.
    report = run(tmp_path, [reader(model=Reader(fooled_at=(4,))), reader("twin", Reader(fooled_at=(8, 4)))])
    sources = [(facts.source.name, facts.source.precision) for facts in report.attacks]
    assert sources == [("reader", "8"), ("reader", "4"), ("twin", "8"), ("twin", "4")]
    assert len(report.cells) == 4 * 4
    assert cell(report, "whiten on reader at 4", "4").threat == "white-box"
    assert cell(report, "whiten on reader at 4", "4").asr.value == 0.75  # those of the seen class stay right
    assert cell(report, "whiten on reader at 8", "4").asr.value == 0
    moved = cell(report, "whiten on twin at 8", "4")
    assert (moved.threat, moved.asr.value) == ("transfer", 0.75)
    assert cell(report, "whiten on twin at 8", "8").asr.value == 0
    assert cell(report, "whiten on twin at 8", "8", "twin").asr.value == 0.75
    # Made once for each source and chunk, whatever the number of victims.
    assert Whiten.calls == ["8 40", "4 40"] * 2


@pytest.mark.parametrize(
    ("transfer", "expected"),
    [
        ("none", {("8", "8"), ("4", "4")}),
        ("float", {("8", "8"), ("4", "4")}),
        ("all", {("8", "8"), ("8", "4"), ("4", "8"), ("4", "4")}),
    ],
)
def test_transfer_says_what_is_moved(tmp_path: Path, transfer: str, expected: set[tuple[str, str]]) -> None:
    report = run(tmp_path, transfer=transfer)
    sources = {facts.name: facts.source.precision for facts in report.attacks}
    assert {(sources[c.attack], c.precision) for c in report.cells} == expected


def with_float() -> LoadedModel:
    loaded = reader()
    loaded.model.switch.allowed = parse_precisions((8, 4, 32))
    return loaded


def test_float_source_is_attacked_though_it_is_not_scored(tmp_path: Path) -> None:
    report = run(tmp_path, [with_float()], precisions=[8, 4], transfer="float")
    sources = {facts.name: facts.source.precision for facts in report.attacks}
    found = {(sources[c.attack], c.precision, c.threat) for c in report.cells}
    assert found == {
        ("8", "8", "white-box"),
        ("4", "4", "white-box"),
        ("32", "8", "transfer"),
        ("32", "4", "transfer"),
    }
    assert report.models[0].precisions == ("8", "4")


def test_surrogates_are_attacked_and_not_scored(tmp_path: Path) -> None:
    surrogate = reader("surrogate", Reader(fooled_at=(8, 4)))
    report = run(tmp_path, [reader(model=Reader(fooled_at=(4,)))], surrogates=[surrogate], precisions=[4])
    assert [model.name for model in report.models] == ["reader"]
    assert [facts.name for facts in report.attacks] == ["whiten on reader at 4", "whiten on surrogate at 4"]
    assert cell(report, "whiten on surrogate at 4", "4").threat == "transfer"
    with pytest.raises(UsageError, match=r"--transfer all or float"):
        run(tmp_path, surrogates=[surrogate], transfer="none")


def test_mean_over_precisions_of_the_same_model_is_eot(tmp_path: Path) -> None:
    mean = parse_mode("8+4")
    report = run(tmp_path, [reader(), reader("other")], eot=[mean], transfer="none")
    found = {(c.attack, c.model, c.precision) for c in report.cells if c.threat == "eot"}
    assert found == {
        (f"whiten on {name} at 8+4", name, precision) for name in ("reader", "other") for precision in ("8", "4")
    }
    assert "None 40" in Whiten.calls  # no single precision that the attack could be told
    everywhere = run(tmp_path, [reader(), reader("other")], eot=[mean])
    assert cell(everywhere, "whiten on other at 8+4", "8").threat == "transfer"


def test_means_have_several_precisions_and_an_attack() -> None:
    assert read_means(["8+4", "4+8"], [WHITEN]) == (parse_mode("8+4"),)
    with pytest.raises(UsageError, match=r"--eot 8 is no mean: give several precisions"):
        read_means(["8"], [WHITEN])
    with pytest.raises(UsageError, match=r"--eot 8\+4 says what an --attack is made on"):
        read_means(["8+4"], [])
    with pytest.raises(UsageError, match=r"vote\(8\+4\) has no gradient to follow"):
        read_means(["vote(8+4)"], [WHITEN])


def test_random_and_voting_networks_are_attacked_through_their_mean(tmp_path: Path) -> None:
    victims = [parse_mode(name) for name in ("random(8+4)", "vote(8+4)", "8")]
    report = run(tmp_path, [reader(model=Reader(fooled_at=(4,)))], precisions=victims)
    assert report.models[0].precisions == ("random(8+4)", "vote(8+4)", "8")
    assert [facts.source.precision for facts in report.attacks] == ["8+4", "8"]
    # Where the precisions disagree, their mean sees the first of two classes: a quarter of the images are attacked.
    robust = {(c.attack, c.precision): (c.threat, c.robust_accuracy.count) for c in report.cells}
    threat, count = robust["whiten on reader at 8+4", "random(8+4)"]
    assert threat == "eot"
    assert 0 < count < 40
    assert robust["whiten on reader at 8+4", "vote(8+4)"] == ("eot", 40)
    again = run(tmp_path / "again", [reader(model=Reader(fooled_at=(4,)))], precisions=victims)
    assert [c.robust_accuracy for c in again.cells] == [c.robust_accuracy for c in report.cells]
    others = [run(tmp_path, [reader(model=Reader(fooled_at=(4,)))], precisions=victims, seed=seed) for seed in range(4)]
    assert len({other.cells[0].robust_accuracy.count for other in others}) > 1


def test_mean_over_a_precision_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no precision 2: it was converted for 8, 4"):
        run(tmp_path, eot=[parse_mode("8+2")])


def test_targets_come_from_the_attack(tmp_path: Path) -> None:
    attacks = [NamedAttack("whiten", Whiten(target=target)) for target in (2, 1)]
    report = run(tmp_path, attacks=attacks, transfer="none", precisions=[4])
    assert [facts.name for facts in report.attacks] == [
        f"whiten targeted to class {target} on reader at 4" for target in (2, 1)
    ]
    hit, missed = report.cells
    assert (hit.asr.count, hit.asr.n, missed.asr.count) == (30, 30, 0)
    with pytest.raises(UsageError, match=r"whiten.*class 4.*4 classes"):
        run(tmp_path, attacks=[NamedAttack("whiten", Whiten(target=4))])
    with pytest.raises(UsageError, match=r"'whiten on reader at 4'"):
        run(tmp_path, attacks=[WHITEN, WHITEN])


def test_family_names_the_settings_that_were_changed() -> None:
    assert NamedAttack("whiten", Whiten(side=3)).family == "whiten side=3"
    assert NamedAttack("a-qapa", AQapa(steps=7, quantize_image=False)).family == "a-qapa steps=7 quantize_image=False"
    assert NamedAttack("whiten", Whiten(target=2)).fingerprint != WHITEN.fingerprint


def test_attack_that_only_makes_patches_is_refused() -> None:
    with pytest.raises(UsageError, match=r"qadtr-brevitas attack MODEL_DIR --attack universal"):
        NamedAttack("universal", object())


def test_killed_in_the_middle_goes_on_with_the_next_chunk(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def stop(done: int, total: int, note: str) -> None:
        assert total == 2 + 2 * 4
        if done == 2 + 5:
            assert note == "whiten on reader at 4, images 0 to 9"
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, batch_size=10, progress=stop)
    assert Whiten.calls == ["8 10"] * 4 + ["4 10"]
    Whiten.calls.clear()
    report = run(tmp_path, batch_size=10)
    assert Whiten.calls == ["4 10"] * 3
    whole = run(tmp_path / "whole", batch_size=10)
    assert whole.model_dump(exclude={"created"}) == report.model_dump(exclude={"created"})


def test_cells_depend_on_chunks_settings_seed_and_content(tmp_path: Path) -> None:
    run(tmp_path)
    for changed in (
        {"batch_size": 30},
        {"seed": 1},
        {"attacks": [NamedAttack("whiten", Whiten(side=3))]},
        {"loaded_models": [reader(fingerprint="retrained")]},
    ):
        Whiten.calls.clear()
        run(tmp_path, **changed)
        assert Whiten.calls, changed
    Whiten.calls.clear()
    run(tmp_path, [reader("renamed", fingerprint="reader-weights")])
    run(tmp_path, batch_size=300)  # the same single chunk
    assert Whiten.calls == []


def test_a_new_victim_needs_the_images_anew_and_keeps_what_is_there(tmp_path: Path) -> None:
    run(tmp_path, precisions=[8])
    assert Whiten.calls == ["8 40"]
    report = run(tmp_path)
    assert Whiten.calls == ["8 40", "8 40", "4 40"]
    run(tmp_path, precisions=[8])
    assert len(Whiten.calls) == 3
    assert len(report.cells) == 4


class AnotherProcess:
    """Keeps the predictions of a victim of its own for the first images that are attacked."""

    def __init__(self) -> None:
        self.key: ChunkKey | None = None
        self.write = CellStore.write_chunk

    def __call__(self, store: CellStore, key: ChunkKey, *, over: bool) -> None:
        if self.key is None:
            self.key = key
            own = {"another": torch.zeros(key.stop - key.start, dtype=torch.int64)}
            self.write(store, key, own if over else store.read_chunk(key) | own)


def test_predictions_of_another_process_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, store, read, logits = AnotherProcess(), CellStore.open(tmp_path), CellStore.read_chunk, Victim.logits
    looked_for: list[ChunkKey] = []

    def remembered(self: CellStore, key: ChunkKey) -> dict[str, Any]:
        looked_for.append(key)
        return read(self, key)

    def interrupted(self: Victim, *keys: Any) -> Any:
        for key in looked_for[:1]:
            other(store, key, over=False)
        return logits(self, *keys)

    monkeypatch.setattr(CellStore, "read_chunk", remembered)
    monkeypatch.setattr(Victim, "logits", interrupted)
    run(tmp_path)
    assert len(read(store, looked_for[0])) == 3


def test_predictions_that_another_process_wrote_over_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, write = AnotherProcess(), CellStore.write_chunk

    def interrupted(self: CellStore, key: ChunkKey, predictions: Any) -> None:
        write(self, key, predictions)
        other(self, key, over=True)

    monkeypatch.setattr(CellStore, "write_chunk", interrupted)
    assert len(run(tmp_path).cells) == 4
    assert len(Whiten.calls) == 3


@pytest.mark.parametrize("damage", ["", "[]", '{"version": 1}', "predictions"])
def test_damaged_chunk_is_computed_again(tmp_path: Path, damage: str) -> None:
    report = run(tmp_path, batch_size=20)
    chunk = next(file for file in sorted((tmp_path / "cells").iterdir()) if '"start"' in file.read_text())
    content = json.loads(chunk.read_text())
    if damage == "predictions":
        content["predictions"] = {name: values[1:] for name, values in content["predictions"].items()}
        damage = json.dumps(content)
    chunk.write_text(damage)
    Whiten.calls.clear()
    assert run(tmp_path, batch_size=20).cells == report.cells
    assert len(Whiten.calls) == 1


@dataclass(frozen=True)
class Noise(ImageAttack):
    """Draws from its generator and from the global one; shows what it drew."""

    add: float = 0.0

    def run(self, model: Any, images: Tensor, labels: Tensor, *, generator: torch.Generator, precision: Any) -> Tensor:
        return (torch.rand(images.shape, generator=generator) + torch.rand(images.shape)) / 2 + self.add


def drawn(*, seed: int = 0, chunk: range = range(10), precision: str = "8", add: float = 0.0) -> Tensor:
    attack = SourcedAttack(NamedAttack("noise", Noise(add)), reader(), parse_mode(precision))
    images = torch.zeros(10, 3, 8, 8)
    return attack.images(images, torch.zeros(10, dtype=torch.int64), seed=seed, chunk=chunk)


def test_streams_depend_on_seed_attack_and_chunk_only() -> None:
    first = drawn()
    before = torch.get_rng_state()
    torch.rand(3)
    assert torch.equal(drawn(), first)
    assert torch.equal(drawn(precision="4"), first)
    assert not torch.equal(drawn(seed=1), first)
    assert not torch.equal(drawn(chunk=range(10, 20)), first)
    torch.set_rng_state(before)
    drawn()
    assert torch.equal(torch.get_rng_state(), before)


@dataclass(frozen=True)
class IndexedNoise(IndexedAttack):
    """Shows what it drew for each image's index, in the colors of the first picture."""

    passes = Passes(7, 3)

    def run(
        self,
        model: Any,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Any = None,
        indices: Any = None,
        pictures: Any = None,
    ) -> Tensor:
        base = float(torch.rand((), generator=generator)) / 2
        shades = torch.tensor([base + index / 100 for index in indices])
        return (shades[:, None, None, None] * (1 - pictures[0][:1])).expand_as(images).clone()


def test_indexed_attacks_make_the_same_images_in_chunks_of_any_size(tmp_path: Path) -> None:
    seen: dict[int, list[Tensor]] = {}

    class Recorder(Reader):
        def forward(self, images: Tensor) -> Tensor:
            seen.setdefault(size, []).append(images)
            return super().forward(images)

    attack = NamedAttack("indexed", IndexedNoise())
    for size in (5, 40):
        loaded = [replace(reader(), model=Recorder(always=0))]
        report = run(tmp_path / str(size), loaded, attacks=[attack], batch_size=size, precisions=parse_precisions([8]))
    made = [torch.cat(batches)[-40:] for batches in seen.values()]
    assert torch.equal(made[0], made[1])
    assert len(made[0].flatten(1).unique(dim=0)) == 40
    assert report.attacks[0].passes == (7, 3)
    assert "at most 7 forward, 3 backward" in markdown(report)


@pytest.mark.parametrize("add", [0.6, -0.6, float("nan")])
def test_attack_that_leaves_the_pixels_range_is_refused(add: float) -> None:
    with pytest.raises(UsageError, match=r"noise.*\[0, 1\]"):
        drawn(add=add)


def test_attack_without_a_registered_name_is_called_by_its_class() -> None:
    assert NamedAttack.of("lavan").name == NamedAttack.of(Lavan()).name == "lavan"
    assert NamedAttack.of(Noise()).name == "Noise"
    with pytest.raises(UsageError, match=r"pgdd.*pgd"):
        NamedAttack.of("pgdd")


def test_attacks_without_gradients_are_black_box() -> None:
    assert NamedAttack("random-patch", RandomPatch()).is_black_box
    assert NamedAttack("sparse-rs", SparseRs()).is_black_box
    assert not NamedAttack("lavan", Lavan()).is_black_box


def test_parameters_get_no_gradients(tmp_path: Path) -> None:
    split = train_split().balanced(6, seed=0)
    info = replace(reader().info, num_classes=CLASSES, classes=split.classes, image_size=(SIDE, SIDE))
    loaded = LoadedModel("net", make_switchable(), "weights", info)
    attack = NamedAttack("a-qapa", AQapa(steps=1, sizes=(4,), quantize_image=False))
    report = run(tmp_path, [loaded], split=split, attacks=[attack], eot=[parse_mode("32+4")])
    assert {facts.source.precision for facts in report.attacks} == {"32", "4", "32+4"}
    assert all(parameter.grad is None and parameter.requires_grad for parameter in loaded.model.parameters())
