"""A cache and an image folder of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from qadtr_brevitas.data import decode
from tests.data.support import picture


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QADTR_BREVITAS_DATA", raising=False)
    return tmp_path / "cache" / "qadtr_brevitas"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with two images in each of train and test."""
    root = tmp_path / "images"
    for split_number, split in enumerate(("train", "test")):
        for class_number, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for number in range(2):
                picture(split_number * 4 + class_number * 2 + number).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def always_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "CACHE_FROM_SECONDS", -1.0)
