"""What `view` opens: a run, or the models, patches and images of a report."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.core.files import read_json, write_json
from qadtr_brevitas.core.patch_size import PatchSize
from qadtr_brevitas.viewing import Scene
from qadtr_brevitas.viewing.subject import Subject, find_subject
from tests.evaluation.models import make_model_dir

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, a sticker and a report of all three."""
    folder = tmp_path_factory.mktemp("subject")
    runs = [make_model_dir(folder / "a"), make_model_dir(folder / "b", name=1)]
    Image.new("RGB", (9, 6), "red").save(folder / "sticker.png")
    sticker = ["--patches", str(folder / "sticker.png"), "--patch-size", "4x5"]
    words = ["evaluate", *map(str, runs), "--precision", "4", "--images", "6", *sticker, "-q"]
    result = CliRunner().invoke(cli, [*words, "-o", str(folder / "report")])
    assert result.exit_code == 0, result.output
    return folder


def test_a_report_names_models_patches_and_images(place: Path, served: list[Scene]) -> None:
    for given in (place / "report", place / "report" / "report.json"):
        served.clear()
        result = CliRunner().invoke(cli, ["view", str(given), "--images", "5", "-q"])
        assert result.exit_code == 0, result.output
        assert [scene.loaded.name for scene in served] == ["a", "b"]
        assert [[one.patch.size for one in scene.patches] for scene in served] == [[(3, 5)]] * 2
        assert [len(scene.split) for scene in served] == [5, 5]


def test_what_is_given_wins(place: Path) -> None:
    report, run = place / "report", place / "a"
    assert find_subject(run) == Subject((run,), ())
    assert find_subject(report).sizes == (PatchSize(4, 5),)  # 3x5, with the proportions of 6x9
    own = find_subject(report, patches=[place / "b.png"], sizes=[PatchSize(2, 2)], data="digits")
    assert (own.patches, own.sizes, own.data) == ((place / "b.png",), (PatchSize(2, 2),), "digits")
    assert find_subject(report, patches=[place / "b.png"]).sizes == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"path": ""}, "memory"), ({"path": "moved/run"}, "moved/run"), ({"fingerprint": "0"}, "other weights")],
)
def test_models_that_are_not_there_or_others_are_named(
    place: Path, tmp_path: Path, change: dict[str, str], words: str
) -> None:
    content = read_json(place / "report" / "report.json")
    content["models"][0] |= change
    write_json(tmp_path / "report.json", content)
    result = CliRunner().invoke(cli, ["view", str(tmp_path), "-q"])
    assert result.exit_code == 1
    assert words in result.output
