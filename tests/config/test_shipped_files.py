from __future__ import annotations

from pathlib import Path

import pytest

import qadtr_brevitas.config.shipped as module
from qadtr_brevitas.config.shipped import copy_recipe, find_recipe, recipe_description, recipe_folder, shipped_recipes
from qadtr_brevitas.core.errors import UsageError


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the shipped recipes; the test runs in an empty one."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    for name in ("toy_qat", "toy_qadtr"):
        (folder / f"{name}.yaml").write_text(f"# The {name} recipe.\nseed: 1\n")
    monkeypatch.setattr(module, "recipe_folder", lambda: folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_an_installed_package_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PACKAGE", tmp_path / "package")
    assert recipe_folder() == tmp_path / "recipes"
    (tmp_path / "package" / "recipes").mkdir(parents=True)
    assert recipe_folder() == tmp_path / "package" / "recipes"


def test_names_are_sorted(shipped: Path) -> None:
    assert list(shipped_recipes()) == ["toy_qadtr", "toy_qat"]


@pytest.mark.parametrize("name", ["toy_qat", "toy_qat.yaml"])
def test_a_shipped_recipe_is_found_by_name(shipped: Path, name: str) -> None:
    assert find_recipe(name) == shipped / "toy_qat.yaml"


def test_a_file_wins_over_a_name_but_a_folder_does_not(shipped: Path) -> None:
    Path("toy_qat").mkdir()
    assert find_recipe("toy_qat") == shipped / "toy_qat.yaml"
    Path("toy_qadtr").write_text("seed: 2\n")
    assert find_recipe("toy_qadtr") == Path("toy_qadtr")


def test_an_unknown_name_is_answered_with_the_nearest(shipped: Path) -> None:
    with pytest.raises(UsageError, match=r"'toy_qatt'.*'toy_qat'"):
        find_recipe("toy_qatt")
    with pytest.raises(UsageError, match=r"'folder/toy_qat.yaml'.*'toy_qat'"):
        find_recipe("folder/toy_qat.yaml")


def test_the_first_comment_is_the_description(shipped: Path, tmp_path: Path) -> None:
    assert recipe_description(shipped / "toy_qat.yaml") == "The toy_qat recipe."
    (tmp_path / "plain.yaml").write_text("seed: 1\n")
    assert recipe_description(tmp_path / "plain.yaml") == ""
    (tmp_path / "empty.yaml").write_text("")
    assert recipe_description(tmp_path / "empty.yaml") == ""


class TestCopy:
    def test_to_a_file_or_into_a_folder(self, shipped: Path) -> None:
        text = (shipped / "toy_qat.yaml").read_text()
        assert copy_recipe("toy_qat", Path("deep/mine.yaml")).read_text() == text
        assert copy_recipe("toy_qat", Path()) == Path("toy_qat.yaml")

    def test_nothing_is_overwritten_unless_forced(self, shipped: Path) -> None:
        target = Path("mine.yaml")
        target.write_text("mine")
        with pytest.raises(UsageError, match=r"mine\.yaml .*--force"):
            copy_recipe("toy_qat", target)
        assert target.read_text() == "mine"
        copy_recipe("toy_qat", target, force=True)
        assert target.read_text().startswith("# The toy_qat")

    def test_onto_itself(self, shipped: Path) -> None:
        with pytest.raises(UsageError, match="cannot copy"):
            copy_recipe("toy_qat", shipped / "toy_qat.yaml", force=True)

    def test_where_nothing_can_be_written(self, shipped: Path) -> None:
        Path("file").write_text("")
        with pytest.raises(UsageError, match=r"cannot copy .* target"):
            copy_recipe("toy_qat", Path("file/mine.yaml"))
