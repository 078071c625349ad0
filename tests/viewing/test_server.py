"""The page to look at a model: its answers, and whom it answers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.data.shapes import Shapes
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.certification import Certification
from qadtr_brevitas.evaluation.defended_classifier import DefendedClassifier
from qadtr_brevitas.evaluation.entries import LoadedModel, NamedPatch, load_models
from qadtr_brevitas.evaluation.masks import mean_color
from qadtr_brevitas.quant import at_precision
from qadtr_brevitas.viewing import Scene, ViewServer
from qadtr_brevitas.viewing.scene import Look
from qadtr_brevitas.viewing.server import page
from tests.evaluation.fakes import white_patch
from tests.evaluation.models import CLASSES, SIDE, make_model_dir

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("view") / "run")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_models([folder])[0]


@pytest.fixture(scope="module")
def split() -> Split:
    return Shapes(image_size=SIDE, classes=CLASSES, train_images=60, test_images=30).load("test", limit=6)


@pytest.fixture(scope="module")
def patch() -> NamedPatch:
    return white_patch("white", side=5)


@pytest.fixture(scope="module")
def server(loaded: LoadedModel, split: Split, patch: NamedPatch) -> Iterator[ViewServer]:
    with ViewServer([Scene(loaded, split, [patch])]) as running:
        thread = Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(server: ViewServer, path: str, data: Any = None, **headers: str) -> tuple[int, str]:
    body = data if isinstance(data, bytes | None) else json.dumps(data).encode()
    base = server.address.partition("/?")[0]
    try:
        with urlopen(Request(base + path, body, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def look(server: ViewServer, **asked: Any) -> dict[str, Any]:
    status, text = ask(server, "/look", {"image": 0, "precision": "4", **asked}, **{"X-Token": server.token})
    return {**json.loads(text), "status": status}


def pixels(address: str) -> Image.Image:
    return Image.open(BytesIO(b64decode(address.removeprefix("data:image/png;base64,"))))


def test_facts_name_images_patches_and_precisions(server: ViewServer, split: Split) -> None:
    status, text = ask(server, f"/facts?token={server.token}")
    facts = json.loads(text)
    assert status == 200
    assert facts["precisions"] == ["32", "4"]
    assert [image["label"] for image in facts["images"]] == [split.classes[label] for label in split.labels]
    assert pixels(facts["images"][0]["picture"]).size == (SIDE, SIDE)
    assert facts["patches"][0] | {"picture": ""} == {
        "name": "white",
        "size": [5, 5],
        "target": split.classes[2],
        "picture": "",
    }
    assert pixels(facts["patches"][0]["picture"]).mode == "RGBA"


@pytest.mark.parametrize("precision", ["32", "4"])
@pytest.mark.parametrize("place", [None, (0, 0), (9, 4)])
def test_the_prediction_is_that_of_the_model_on_the_patched_image(
    server: ViewServer,
    loaded: LoadedModel,
    split: Split,
    patch: NamedPatch,
    precision: str,
    place: tuple[int, int] | None,
) -> None:
    images, labels = split.batch(torch.tensor([3]))
    asked: dict[str, Any] = {}
    if place is not None:
        row, column = place
        images[..., row : row + 5, column : column + 5] = 1
        asked = {"patch": 0, "row": row, "column": column}
    with at_precision(loaded.model, int(precision)), torch.no_grad():
        best = loaded.model(images)[0].double().softmax(0).topk(3)
    found = look(server, image=3, precision=precision, **asked)
    assert [line["class"] for line in found["top"]] == [split.classes[index] for index in best.indices]
    assert [line["probability"] for line in found["top"]] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert found["label"] == split.classes[int(labels)]
    assert "votes" not in found


def test_the_gradient_is_that_of_the_loss_of_the_true_class(
    server: ViewServer, loaded: LoadedModel, split: Split
) -> None:
    images, labels = split.batch(torch.tensor([0]))
    images.requires_grad_()
    with at_precision(loaded.model, 4):
        torch.nn.functional.cross_entropy(loaded.model(images), labels).backward()
    assert images.grad is not None
    found = look(server)["gradient"]
    assert found["largest"] == pytest.approx(images.grad.abs().max().item(), rel=1e-3)
    picture = pixels(found["picture"])
    assert picture.size == (SIDE, SIDE)
    strongest = images.grad[0].abs().amax(0).argmax().item()
    assert picture.convert("L").tobytes()[int(strongest)] == 255


def test_the_masks_vote_as_brute_force_says(
    server: ViewServer, loaded: LoadedModel, split: Split, patch: NamedPatch
) -> None:
    found = look(server, image=1, patch=0, row=6, column=6, votes=True, prove=True)["votes"]
    image = split.batch(torch.tensor([1]))[0]
    image[..., 6:11, 6:11] = 1
    fill = mean_color(loaded.info.mean)
    for mask in found["masks"]:
        row, column, height, width = mask["box"]
        covered = image.clone()
        covered[..., row : row + height, column : column + width] = fill
        with at_precision(loaded.model, 4), torch.no_grad():
            assert split.classes[int(loaded.model(covered).argmax())] == mask["class"]
    assert len(found["masks"]) % found["columns"] == 0
    defended = DefendedClassifier(loaded, 4, Certification(5))(image)
    assert found["decision"] == split.classes[int(defended.classes)]
    assert found["proved"] == bool(defended.certified)
    assert look(server, votes=True)["votes"]["proved"] is None


def test_pages_of_others_are_refused(server: ViewServer) -> None:
    host = server.address.split("/")[2]
    good = {"X-Token": server.token}
    asked = {"image": 0, "precision": "4"}
    assert ask(server, "/look", asked, **good, Origin=f"http://{host}")[0] == 200
    assert ask(server, "/look", asked, **good, Host="localhost:1")[0] == 200
    for headers in (
        {"X-Token": "guess"},
        {},
        {**good, "Host": "evil.example"},
        {**good, "Host": f"evil.example:{host.partition(':')[2]}"},
        {**good, "Host": "127.0.0.1.evil.example:80"},
        {**good, "Origin": "http://evil.example"},
        {**good, "Origin": "null"},
    ):
        assert ask(server, "/look", asked, **headers)[0] == 403, headers
    for path in ("/", "/facts", "/?token=x"):
        assert ask(server, path)[0] == 403
    assert ask(server, f"/?token={server.token}", Host="evil.example")[0] == 403


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"image": 6}, "0 to 5"),
        ({"image": -1}, "0 to 5"),
        ({"image": "0"}, "image"),
        ({"image": True}, "image"),
        ({"patch": 1}, "patch"),
        ({"patch": 0, "row": 12}, "outside"),
        ({"patch": 0, "column": -1}, "outside"),
        ({"precision": "3"}, "3"),
        ({"precision": 4}, "precision"),
        ({"model": 1}, "0 to 0"),
        ({"model": "0"}, "model"),
        ({"extra": 1}, "extra"),
    ],
)
def test_bad_questions_are_answered_with_a_reason(server: ViewServer, asked: dict[str, Any], word: str) -> None:
    found = look(server, **asked)
    assert found["status"] == 400
    assert word in found["error"]


def test_each_model_is_asked_by_its_index(server: ViewServer, folder: Path, split: Split, tmp_path: Path) -> None:
    folders = [folder, make_model_dir(tmp_path / "other", precisions=(32, 8))]
    scenes = [Scene(loaded, split) for loaded in load_models(folders)]
    with ViewServer(scenes) as both:
        found = [both.facts(number) for number in ("0", "1")]
        assert [facts["models"] for facts in found] == [["run", "other"]] * 2
        assert [(facts["model"], facts["precisions"]) for facts in found] == [
            ("run", ["32", "4"]),
            ("other", ["32", "8"]),
        ]
        seen = both.look(Look(image=0, precision="8", model=1))
        with pytest.raises(UsageError, match="no precision 8"):
            both.look(Look(image=0, precision="8"))
        assert seen == scenes[1].look(Look(image=0, precision="8"))
    for wrong in ("1", "-1", "x"):
        assert ask(server, f"/facts?token={server.token}&model={wrong}")[0] == 400


def test_the_end_waits_for_a_look(loaded: LoadedModel, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    started, released, scene = Event(), Event(), Scene(loaded, split)
    forward = loaded.model.forward

    def slow(images: torch.Tensor) -> torch.Tensor:
        started.set()
        assert released.wait(60)
        return forward(images)

    monkeypatch.setattr(loaded.model, "forward", slow)
    looking = Thread(target=scene.look, args=(Look(image=0, precision="4"),))
    server = ViewServer([scene])
    closing = Thread(target=server.__exit__, args=(None, None, None))
    looking.start()
    assert started.wait(60)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    released.set()
    closing.join(60)
    assert not closing.is_alive()


@pytest.mark.parametrize(("error", "is_told"), [(BrokenPipeError(), False), (ZeroDivisionError(), True)])
def test_a_browser_that_left_is_no_error(
    server: ViewServer, error: Exception, is_told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        raise error
    except type(error):
        server.handle_error(None, ("127.0.0.1", 1))
    assert (type(error).__name__ in capsys.readouterr().err) == is_told


def test_bad_requests(server: ViewServer) -> None:
    token = {"X-Token": server.token}
    assert ask(server, "/look", b"{", **token)[0] == 400
    assert ask(server, "/look", b"[]", **token)[0] == 400
    assert ask(server, "/look", b"{}", **token)[0] == 400
    assert ask(server, "/look", b"x" * 70_000, **token)[0] == 413
    assert ask(server, "/other", {}, **token)[0] == 404
    assert ask(server, f"/other?token={server.token}")[0] == 404


def test_the_page_needs_no_other_host(server: ViewServer) -> None:
    status, text = ask(server, f"/?token={server.token}")
    assert status == 200
    assert not re.search(r"https?://|src=\"[^\"]|@import|url\(", text)
    assert "NONCE" not in text
    assert 'nonce="abc"' in page("abc")


def test_without_a_patch_there_is_noise_and_too_large_ones_are_refused(loaded: LoadedModel, split: Split) -> None:
    scene = Scene(loaded, split)
    assert [(named.name, named.patch.size) for named in scene.patches] == [("noise", (4, 4))]
    assert scene.patches[0].patch.texture.equal(Scene(loaded, split).patches[0].patch.texture)
    with pytest.raises(UsageError, match="--patch-size"):
        Scene(loaded, split, [white_patch(side=SIDE + 1)])


def test_a_port_that_is_taken(server: ViewServer) -> None:
    with pytest.raises(UsageError, match="--port"):
        ViewServer(server.scenes, port=server.server_address[1])


def test_the_command_prints_the_address_and_ends_by_ctrl_c(folder: Path, served: list[Scene]) -> None:
    result = CliRunner().invoke(cli, ["view", str(folder), "--images", "5", "-q"])
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=\S+\n", result.stdout)
    assert len(served[0].split) == 5
    missing = CliRunner().invoke(cli, ["view", str(folder / "nothing")])
    assert missing.exit_code == 1
    assert "no model" in missing.output


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_draws_it(server: ViewServer, width: int, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}")
    common = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},900")
    command = [browser, *common, "--virtual-time-budget=20000", "--dump-dom", f"{server.address}#votes=1"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert 'data-ready="yes"' in text
    assert re.search(r'id="verdict">(Right|Wrong): \w+', text)
    assert text.count('title="') >= 9
