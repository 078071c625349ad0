"""Shared by all tests: one thread, fixed seeds, and the real data where it is there."""

from __future__ import annotations

import getpass
import os
import random
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]
DATA_VARIABLE = "QADTR_BREVITAS_TEST_DATA"

# Timing differs too much between machines for a deadline; the same examples everywhere keep failures repeatable.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small networks are fastest on one thread, and sums come out the same everywhere."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Seeds the global generators and checks that nothing leaves them in a mode of its own."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32


@pytest.fixture
def no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain output whatever the terminal."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with CIFAR-10 and published weights, which is not part of the repository."""
    folder = Path(os.environ.get(DATA_VARIABLE) or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}; {DATA_VARIABLE} can name another")
    return folder


@pytest.fixture(scope="session")
def cifar10_root(shared_data: Path) -> Path:
    """CIFAR-10 unpacked once and for all: the folder that holds `train` and `test`."""
    archive = shared_data / "cifar10.tar"
    if not archive.is_file():
        pytest.skip(f"needs {archive}")
    facts = archive.stat()
    cache = Path(tempfile.gettempdir()) / f"qadtr_brevitas-tests-{getpass.getuser()}"
    folder = cache / f"cifar10-{facts.st_size}-{facts.st_mtime_ns}"
    if not folder.is_dir():
        cache.mkdir(mode=0o700, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache))
        with tarfile.open(archive) as tar:
            tar.extractall(unfinished, filter="data")
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
            shutil.rmtree(unfinished)
    return folder / "cifar10"
