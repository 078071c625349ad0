from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation import CellStore, Grid, NamedAttack, compute, evaluate
from qadtr_brevitas.evaluation.report import EvaluationReport
from qadtr_brevitas.evaluation.sharding import Shard, local_device, missing_by_share, process_share
from tests.evaluation.fakes import Whiten, make_grid, reader, white_patch


@pytest.fixture(autouse=True)
def no_calls() -> Iterator[None]:
    Whiten.calls.clear()
    yield
    Whiten.calls.clear()


def grid() -> Grid:
    attacks = [NamedAttack("whiten", Whiten())]
    return make_grid([reader(), reader("other")], [white_patch()], attacks=attacks, batch_size=10)


def same(left: EvaluationReport, right: EvaluationReport) -> bool:
    return left.model_dump(exclude={"created"}) == right.model_dump(exclude={"created"})


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "a/b", "1/2/3", "-1/2", "1/0"])
def test_unreadable_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"k/n"):
        Shard.parse(text)


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_shares_are_a_partition_of_equal_parts(of: int) -> None:
    shares = [Shard(number, of).pick(range(20)) for number in range(1, of + 1)]
    assert sorted(item for share in shares for item in share) == list(range(20))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("of", [2, 3])
def test_shares_merge_to_the_same_report(tmp_path: Path, of: int) -> None:
    whole = evaluate(grid(), output=tmp_path / "whole")
    assert len(Whiten.calls) == 4 * 4
    Whiten.calls.clear()
    folders = [tmp_path / str(number) for number in range(1, of + 1)]
    for number, folder in enumerate(folders, 1):
        compute(Shard(number, of).pick(grid().jobs()), CellStore.open(folder))
    assert len(Whiten.calls) == 4 * 4
    merged = evaluate(grid(), output=tmp_path / "merged", cells=folders)
    assert len(Whiten.calls) == 4 * 4
    assert same(merged, whole)
    assert not (tmp_path / "merged" / "cells").exists()


def test_what_is_missing_is_counted_by_share(tmp_path: Path) -> None:
    store, jobs = CellStore.open(tmp_path), grid().jobs()
    assert len(jobs) == 4 * 3 + 4 * 4
    assert missing_by_share(jobs, store, 3) == {Shard(1, 3): 10, Shard(2, 3): 9, Shard(3, 3): 9}
    compute(Shard(2, 3).pick(jobs), store)
    assert missing_by_share(jobs, store, 3) == {Shard(1, 3): 10, Shard(3, 3): 9}
    compute(jobs, store)
    assert missing_by_share(jobs, store, 3) == {}
    assert str(Shard(2, 3)) == "2/3"


def test_victims_of_one_chunk_may_come_from_two_folders(tmp_path: Path) -> None:
    attacks = [NamedAttack("whiten", Whiten())]
    for precision in (8, 4):
        compute(
            make_grid([reader()], attacks=attacks, precisions=[precision]).jobs(),
            CellStore.open(tmp_path / str(precision)),
        )
    Whiten.calls.clear()
    both = make_grid([reader()], attacks=attacks, transfer="none")
    evaluate(both, output=tmp_path, cells=[tmp_path / "8", tmp_path / "4" / "cells"])
    assert Whiten.calls == []


def test_folder_without_cells_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UsageError, match=r"no cells in .*--cells"):
        CellStore.open(tmp_path / "new", [tmp_path])


def test_processes_of_torchrun_share_the_work() -> None:
    assert process_share({}) == Shard(1, 1)
    assert process_share({"RANK": "1", "WORLD_SIZE": "2"}) == Shard(2, 2)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = {"LOCAL_RANK": "3"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device("auto", rank) == local_device("cuda", rank) == "cuda:1"
    assert (local_device("cuda:0", rank), local_device("cpu", rank), local_device("auto", {})) == (
        "cuda:0",
        "cpu",
        "auto",
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert local_device("auto", rank) == "auto"
