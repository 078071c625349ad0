"""Runs whose images are read from files by worker processes: the same as in memory, resumable, safe from bad files."""

from __future__ import annotations

import io
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.training.loop import train
from qadtr_brevitas.training.state import load_state
from tests.data.support import picture
from tests.data.test_loader import children
from tests.training.support import Boom, Recorder, StopAt, explode, make_recipe, same_weights

pytestmark = pytest.mark.slow

TRANSFORM = {"scale": [0.3, 1.0], "rand_augment": "rand-m5", "erase": 0.3, "mixup": 0.4, "cutmix": 1.0}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of 12 pictures each for training, 4 for tests, in several sizes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, count in (("train", 12), ("test", 4)):
        for name in "abc":
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                picture(number, (8 + number % 4, 12)).save(place / f"{number:02}.png")
    return tmp_path / "images"


def pack(files: list[Path], folder: Path) -> None:
    """Write pictures into shards of seven samples, in their order."""
    folder.mkdir(parents=True)
    for shard in range(-(-len(files) // 7)):
        with tarfile.open(folder / f"x-{shard:03}.tar", "w") as tar:
            for file in files[7 * shard : 7 * shard + 7]:
                key, label = f"{file.parent.name}{file.stem}", str("abc".index(file.parent.name)).encode()
                tar.add(file, f"{key}.png")
                member = tarfile.TarInfo(f"{key}.cls")
                member.size = len(label)
                tar.addfile(member, io.BytesIO(label))


def recipe_of(root: Path, *, data: dict[str, Any] | None = None, **dataset: Any) -> Recipe:
    """Two epochs of nine steps, the first of them at 32 bit."""
    recipe = make_recipe(epochs=1, batch_size=4, checkpoint_every=3, regularizers=[], norm_batches=1).model_dump()
    images = {"name": "image-folder", "root": str(root), "image_size": 8, **dataset}
    recipe["data"] = {**recipe["data"], "dataset": images, "workers": 0, **(data or {})}
    return Recipe.model_validate(recipe)


@pytest.mark.parametrize("val_share", [0.0, 0.1])
def test_streamed_images_train_the_same_network_as_those_in_memory(
    root: Path, tmp_path: Path, val_share: float
) -> None:
    runs = Recorder(), Recorder()
    data = {"val_share": val_share}
    held = train(recipe_of(root, data=data), tmp_path / "held", device="cpu", observer=runs[0])
    # Nothing but the images of a batch can be held.
    small = recipe_of(root, data=data, max_gb=1e-9)
    streamed = train(small, tmp_path / "streamed", device="cpu", observer=runs[1])
    assert same_weights(held, streamed)
    accuracies = [[record.val_accuracy for record in run.epochs] for run in runs]
    assert accuracies[0] == accuracies[1]
    assert any(accuracies[0])


def test_a_run_resumes_in_mid_epoch_with_another_number_of_workers(root: Path, tmp_path: Path) -> None:
    whole = train(recipe_of(root, data={"transform": TRANSFORM}), tmp_path / "whole", device="cpu")
    run = tmp_path / "resumed"
    recipe = recipe_of(root, data={"transform": TRANSFORM, "workers": 2})
    with pytest.raises(Boom):
        train(recipe, run, device="cpu", observer=StopAt(13, explode))
    train(recipe_of(root, data={"transform": TRANSFORM, "workers": 1}), run, device="cpu")
    assert same_weights(whole, run)


def test_a_run_on_shards_resumes_at_the_sample_and_is_that_on_files(root: Path, tmp_path: Path) -> None:
    changed = {"transform": TRANSFORM}
    on_files = train(recipe_of(root, data=changed), tmp_path / "files", device="cpu")
    for split in ("train", "test"):
        pack(sorted((root / split).rglob("*.png")), tmp_path / "shards" / split)
    shards, keys = tmp_path / "shards", {"name": "shards", "classes": 3}
    whole = train(recipe_of(shards, data=changed, **keys), tmp_path / "whole", device="cpu")
    assert same_weights(whole, on_files)
    run = tmp_path / "resumed"
    two, one = (recipe_of(shards, data={**changed, "workers": workers}, **keys) for workers in (2, 1))
    with pytest.raises(Boom):
        train(two, run, device="cpu", observer=StopAt(14, explode))
    saved = load_state(run)
    assert saved is not None
    # In the middle of an epoch of nine steps; the workers had read further.
    assert saved.counters.step == 12
    train(one, run, device="cpu")
    assert same_weights(whole, run)


def test_a_damaged_picture_stops_the_run_with_its_state_saved(root: Path, tmp_path: Path) -> None:
    whole = train(recipe_of(root, stream=True), tmp_path / "whole", device="cpu")
    files = sorted((root / "train").rglob("*.png"))
    contents = [file.read_bytes() for file in files]
    run = tmp_path / "run"

    def damage() -> None:
        for file in files:
            file.write_bytes(b"no image")

    with pytest.raises(DataError, match=r"cannot read the image .*\.png.*state after step 4 is saved"):
        train(recipe_of(root, stream=True), run, device="cpu", observer=StopAt(4, damage))
    saved = load_state(run)
    assert saved is not None
    assert saved.counters.step == 4
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    train(recipe_of(root, stream=True), run, device="cpu")
    assert same_weights(whole, run)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker in /proc")
def test_a_killed_worker_stops_the_run_with_its_state_saved(root: Path, tmp_path: Path) -> None:
    recipe, before = recipe_of(root, data={"workers": 1}, stream=True), set(children())

    def kill() -> None:
        for worker in set(children()) - before:
            os.kill(worker, signal.SIGKILL)

    with pytest.raises(DataError, match=r"data\.workers.*is saved"):
        train(recipe, tmp_path / "run", device="cpu", observer=StopAt(4, kill))
    train(recipe, tmp_path / "run", device="cpu")
    assert same_weights(tmp_path / "run", train(recipe, tmp_path / "whole", device="cpu"))
