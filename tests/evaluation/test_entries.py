from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from qadtr_brevitas.core.errors import CheckpointError, DataError, UsageError
from qadtr_brevitas.core.patch_size import PatchSize
from qadtr_brevitas.evaluation.entries import LoadedModel, load_models, load_patches, unique_names
from qadtr_brevitas.pipeline.checkpoint import load_model
from qadtr_brevitas.pipeline.directories import patch_folder
from qadtr_brevitas.quant.switch import set_precision
from tests.evaluation.fakes import coded_split, reader, white_patch
from tests.evaluation.models import make_model_dir


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/qat"], ["qat"]),
        (["runs/qat", "runs/qadtr"], ["qat", "qadtr"]),
        (["a/net", "b/net"], ["a/net", "b/net"]),
        (["runs/qat/last"], ["qat/last"]),
        (["runs/qat/last", "runs/qat/best"], ["qat/last", "qat/best"]),
        ([], []),
    ],
)
def test_names_are_the_shortest_that_differ(paths: list[str], names: list[str]) -> None:
    assert unique_names([Path(path) for path in paths]) == names


def test_same_path_twice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"runs/\.\./runs/qat is given twice"):
        unique_names([Path("runs/../runs/qat"), Path("runs/qat")])


def test_patches_of_folders_and_files(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        white_patch().patch.save(tmp_path / folder / "white")
    white_patch(side=3).patch.save(tmp_path / "other")
    found = load_patches([tmp_path / "one", tmp_path / "two", tmp_path / "other.safetensors", tmp_path / "one"])
    assert [patch.name for patch in found] == ["one/white", "two/white", f"{tmp_path.name}/other"]
    facts = found[0].facts
    assert (facts.attack, facts.target, facts.height, facts.pixels, facts.place) == ("lavan", 2, 2, 4, "random")
    assert facts.source is not None
    assert (facts.source.fingerprint, facts.source.precision) == ("reader-weights", "4")
    assert facts.geometry != found[2].facts.geometry


def test_fingerprint_is_of_content(tmp_path: Path) -> None:
    plain, placed = white_patch(), white_patch(place=(0, 0))
    assert plain.facts.fingerprint == white_patch("renamed", target=None).facts.fingerprint
    assert plain.facts.fingerprint != placed.facts.fingerprint
    assert plain.facts.family == "lavan 2x2"
    assert placed.facts.family == "lavan 2x2 at 0,0"
    assert white_patch(target=None).facts.family == "lavan 2x2 untargeted"


def test_missing_patches_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no patches in .*qadtr-brevitas attack"):
        load_patches([tmp_path])
    with pytest.raises(UsageError, match=r"no patches at .*nowhere"):
        load_patches([tmp_path / "nowhere"])
    (tmp_path / "broken.safetensors").write_bytes(b"no patch")
    with pytest.raises(CheckpointError, match="broken"):
        load_patches([tmp_path])


def test_patches_of_ones_own_are_scaled_to_the_sizes_asked_for(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "photo.jpg")
    made = white_patch().patch.save(tmp_path / "white")
    found = load_patches([tmp_path / "photo.jpg", made], sizes=[PatchSize(4, 4), PatchSize(6, 6)])
    assert [(entry.name, entry.patch.size) for entry in found] == [
        ("photo 4x4", (2, 4)),
        ("photo 6x6", (3, 6)),
        ("white", (2, 2)),
    ]
    assert [entry.is_own for entry in found] == [True, True, False]
    assert found[0].facts.source is None
    with pytest.raises(UsageError, match="sizes are for patches of one's own"):
        load_patches([made], sizes=[PatchSize(4, 4)])


def test_the_enlarged_picture_beside_a_patch_stands_for_the_patch(tmp_path: Path) -> None:
    white_patch().patch.save(tmp_path / "white")
    (found,) = load_patches([tmp_path / "white.png"])
    assert (found.patch.size, found.facts.attack) == ((2, 2), "lavan")


def test_data_of_other_or_otherwise_ordered_classes_are_refused() -> None:
    loaded, split = reader(), coded_split()
    loaded.check_data(split, data="coded")
    turned = replace(split, classes=(*split.classes[:2], *split.classes[:1:-1]))
    with pytest.raises(DataError, match=r"class 2 .*coded .*'d'.*reader .*'c'.*class_order"):
        loaded.check_data(turned, data="coded")
    loaded.check_data(replace(split, classes=tuple("0123")), data="of numbers for names")


def test_patches_of_a_run_are_those_of_its_last_model(tmp_path: Path) -> None:
    for folder in ("last", "best"):
        (tmp_path / "run" / folder).mkdir(parents=True)
    assert patch_folder(tmp_path / "run") == patch_folder(tmp_path / "run" / "last") == tmp_path / "run" / "patches"
    assert patch_folder(tmp_path / "run" / "best") == tmp_path / "run" / "best" / "patches"
    (tmp_path / "run" / "last" / "patches").mkdir()
    assert patch_folder(tmp_path / "run" / "last") == tmp_path / "run" / "last" / "patches"


@pytest.mark.slow
def test_model_in_memory_has_the_fingerprint_of_its_directory(tmp_path: Path) -> None:
    (saved,) = load_models([make_model_dir(tmp_path / "net")])
    model, info = load_model(tmp_path / "net" / "last")
    assert LoadedModel.from_model(model, info=info).fingerprint == saved.fingerprint
    set_precision(model, 4)
    assert LoadedModel.from_model(model, info=info).fingerprint == saved.fingerprint
    other = replace(info, mean=(0.4, 0.5, 0.5))
    assert LoadedModel.from_model(model, info=other).fingerprint != saved.fingerprint
    next(model.parameters()).data.add_(1e-3)
    assert LoadedModel.from_model(model, info=info).fingerprint != saved.fingerprint
