import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.training.loop import train
from qadtr_brevitas.training.state import differing_keys, load_state
from qadtr_brevitas.training.stop import Interrupted
from tests.training.support import Boom, Recorder, StopAt, explode, make_recipe, same_weights, train_to_be_killed

pytestmark = pytest.mark.slow

STEPS = 24


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    return train(make_recipe(val_share=0.0), tmp_path_factory.mktemp("runs") / "whole", device="cpu")


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures(run: Path) -> list[tuple]:
    return [(r["kind"], r["step"], r.get("precision"), r.get("loss"), r.get("val_accuracy")) for r in lines(run)]


def test_same_recipe_gives_same_weights(whole: Path, tmp_path: Path) -> None:
    again = train(make_recipe(), tmp_path / "again", device="cpu")
    assert same_weights(whole, again)
    assert figures(whole) == figures(again)


@pytest.mark.parametrize("step", [2, 5, 6, 9, 20, 24])
def test_a_failed_run_resumes_bit_for_bit(whole: Path, tmp_path: Path, step: int) -> None:
    with pytest.raises(Boom):
        train(make_recipe(), tmp_path, device="cpu", observer=StopAt(step, explode))
    train(make_recipe(), tmp_path, device="cpu")
    assert same_weights(whole, tmp_path)
    assert figures(whole) == figures(tmp_path)


def test_a_network_is_checked_before_a_run_starts_and_before_it_goes_on(tmp_path: Path) -> None:
    checked: list[object] = []
    recipe = make_recipe(epochs=1, float_epochs=0, attack=None, gradient=None, regularizers=[])
    with pytest.raises(Boom):
        train(recipe, tmp_path, device="cpu", observer=StopAt(2, explode), check=checked.append)
    train(recipe, tmp_path, device="cpu", check=checked.append)
    assert len(checked) == 2
    train(recipe, tmp_path, device="cpu", check=checked.append)
    assert len(checked) == 2


def wait_for_steps(process: multiprocessing.process.BaseProcess, metrics: Path, steps: int) -> None:
    """Waits until the process has logged so many steps."""

    def lines() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    before, deadline = lines(), time.monotonic() + 60
    while process.is_alive() and lines() < before + steps and time.monotonic() < deadline:
        time.sleep(0.005)
        # A resumed run first deletes the lines after its last state.
        before = min(before, lines())


def test_a_killed_run_resumes_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    # A server that has everything imported: each process starts at once instead of after seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.support"])
    moments = random.Random(0)
    kills = 0
    while True:
        process = context.Process(target=train_to_be_killed, args=(tmp_path,))
        process.start()
        # Counted in steps, so that a slow machine gets on too; what follows may strike at any moment.
        wait_for_steps(process, tmp_path / "metrics.jsonl", moments.randint(1, 7))
        process.join(moments.uniform(0.0, 0.1))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        load_state(tmp_path)
        kills += 1
        assert kills < 50, "the run never ends"
    assert kills >= 3
    train(make_recipe(), tmp_path, device="cpu")
    assert same_weights(whole, tmp_path)
    assert figures(whole) == figures(tmp_path)


def test_finished_run_does_nothing(whole: Path) -> None:
    before = (whole / "last" / "model.safetensors").stat().st_mtime_ns
    recorder = Recorder()
    train(make_recipe(), whole, device="cpu", observer=recorder)
    assert "is finished, there is nothing to do" in recorder.messages[0]
    assert not recorder.steps
    assert (whole / "last" / "model.safetensors").stat().st_mtime_ns == before


def test_finished_run_writes_a_model_that_was_removed(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "last")
    recorder = Recorder()
    train(make_recipe(), run, device="cpu", observer=recorder)
    assert "is finished: wrote its model" in recorder.messages[0]
    assert not recorder.steps
    assert same_weights(run, whole)
    assert lines(run) == lines(whole)


def test_a_run_that_saved_nothing_is_replaced(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(whole / "recipe.yaml", tmp_path / "run")
    train(make_recipe(epochs=1), tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / "last").is_dir()


def test_other_recipe_is_refused_and_keys_are_named(whole: Path) -> None:
    with pytest.raises(UsageError, match=r"another recipe.*train\.epochs, train\.optimizer\.lr\. Choose"):
        train(make_recipe(epochs=4, optimizer={"lr": 0.1}), whole, device="cpu")


def test_never_refuses_a_run_unless_overwriting(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"already holds a run.*-o"):
        train(make_recipe(), whole, resume="never", device="cpu")
    quick = {"epochs": 1, "float_epochs": 0, "norm_batches": 0, "attack": None, "scheduler": {"warmup_epochs": 0}}
    train(make_recipe(**quick, val_share=0.2), tmp_path, device="cpu")
    assert (tmp_path / "best").is_dir()
    train(make_recipe(**quick), tmp_path, resume="never", overwrite=True, device="cpu")
    assert not (tmp_path / "best").is_dir()
    assert [line["step"] for line in lines(tmp_path)] == [*range(1, 7), 6]


def test_file_in_place_of_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UsageError, match=r"is a file.*-o"):
        train(make_recipe(), tmp_path / "run", device="cpu")


def test_a_model_in_place_of_the_run_is_refused(whole: Path, tmp_path: Path) -> None:
    model = shutil.copytree(whole / "last", tmp_path / "model")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"model directory.*-o"):
            train(make_recipe(), model, resume="never" if overwrite else "auto", overwrite=overwrite, device="cpu")
    assert not (model / "recipe.yaml").exists()


@pytest.mark.parametrize("damage", [b"", b"not a state", b"PK\x03\x04 truncated"])
def test_damaged_state_is_refused(whole: Path, tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "recipe.yaml").write_text((whole / "recipe.yaml").read_text())
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "training.pt").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"training\.pt is damaged.*--resume never --overwrite"):
        train(make_recipe(), tmp_path, device="cpu")


def test_pickled_code_in_a_state_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "recipe.yaml").write_text(make_recipe().dump_yaml())
    (tmp_path / "state").mkdir()
    torch.save({"version": 1, "model": Evil()}, tmp_path / "state" / "training.pt")
    with pytest.raises(CheckpointError, match="is damaged"):
        train(make_recipe(), tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_other_version_of_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    torch.save({"version": 99}, tmp_path / "state" / "training.pt")
    with pytest.raises(CheckpointError, match=r"version 99.*version 1"):
        load_state(tmp_path)


def test_an_interrupted_run_saves_its_state_and_names_the_way_to_resume(whole: Path, tmp_path: Path) -> None:
    assert threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    stopper = StopAt(9, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match=r"after step 10 .*state saved in .*same command"):
        train(make_recipe(), tmp_path, device="cpu", observer=stopper)
    assert signal.getsignal(signal.SIGINT) is handler
    recorder = Recorder()
    train(make_recipe(), tmp_path, device="cpu", observer=recorder)
    assert "after step 10" in recorder.messages[0]
    assert recorder.steps[0].step == 11
    assert same_weights(whole, tmp_path)


def test_full_disk_keeps_the_last_state(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def full(content: dict, path: Path) -> None:
        if content["state"]["step"] > 8:
            path.write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        save(content, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(make_recipe(), tmp_path, device="cpu")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["training.pt"]
    saved = load_state(tmp_path)
    assert saved is not None
    assert saved.counters.step == 8
    train(make_recipe(), tmp_path, device="cpu")
    assert same_weights(whole, tmp_path)


def test_metrics_cut_off_by_a_crash_are_repaired(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Boom):
        train(make_recipe(), tmp_path, device="cpu", observer=StopAt(7, explode))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')
    train(make_recipe(), tmp_path, device="cpu")
    assert figures(whole) == figures(tmp_path)


def test_differing_keys_also_names_plug_in_fields() -> None:
    one, other = make_recipe(gradient={"name": "gir", "alpha": 0.2}), make_recipe(gradient=None)
    assert "train.gradient" in differing_keys(one, other)[0]
    assert differing_keys(one, make_recipe()) == ["train.gradient.alpha"]
    assert differing_keys(one, one) == []


def test_model_directory_is_readable_by_safetensors(whole: Path) -> None:
    assert load_file(whole / "last" / "model.safetensors")
