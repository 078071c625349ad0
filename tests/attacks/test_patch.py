import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qadtr_brevitas.attacks.fake_quantize import fake_quantize
from qadtr_brevitas.attacks.geometry import crop
from qadtr_brevitas.attacks.patch import FORMAT, Patch, versions
from qadtr_brevitas.attacks.shapes import shape_mask
from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.core.seeding import generator

META = {"attack": "lavan", "settings": {"steps": 5, "lr": 0.05}, "target": 3, "seed": 7, "versions": versions()}


def example(side=8, place="random"):
    drawn = torch.rand(3, side, side, generator=generator(0, "patch"))
    return Patch(texture=fake_quantize(drawn, 8), mask=shape_mask("disc", side), place=place, meta=META)


@pytest.mark.parametrize("place", ["random", (2, 5)])
def test_saving_and_loading_changes_nothing(tmp_path, place):
    patch = example(place=place)
    loaded = Patch.load(patch.save(tmp_path / "a.safetensors"))
    assert torch.equal(loaded.texture, patch.texture)
    assert loaded.texture.dtype == torch.float32
    assert torch.equal(loaded.mask, patch.mask)
    assert loaded.place == place
    assert loaded.meta == META


def test_every_8_bit_value_survives(tmp_path):
    texture = (torch.arange(3 * 16 * 16) % 256).view(3, 16, 16) / 255
    patch = Patch(texture=texture, mask=shape_mask("square", 16))
    assert torch.equal(Patch.load(patch.save(tmp_path / "all")).texture, texture)


def test_suffixes_of_file_names(tmp_path):
    assert example().save(str(tmp_path / "new" / "t3.6px")) == tmp_path / "new" / "t3.6px.safetensors"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["t3.6px.png", "t3.6px.safetensors"]
    assert Patch.load(tmp_path / "new" / "t3.6px").meta == META


def test_the_picture_is_enlarged_without_smoothing_and_clear_outside_the_mask(tmp_path):
    patch = example()
    patch.save(tmp_path / "a")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "RGBA"
        assert picture.size == (256, 256)
        small = picture.resize((8, 8), Image.Resampling.NEAREST)
        values = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    assert torch.equal(values[:3] / 255, patch.texture)
    assert torch.equal(values[3] == 255, patch.mask)


def test_black_pixels_of_a_patch_are_not_holes():
    patch = Patch(texture=torch.zeros(3, 4, 4), mask=shape_mask("square", 4), place=(0, 0))
    assert patch.pixels == 16
    assert patch.apply(torch.ones(1, 3, 8, 8)).sum() == 3 * (64 - 16)


def test_apply_follows_the_place():
    images = torch.rand(4, 3, 16, 16, generator=generator(0, "images"))
    fixed = example(4, place=(3, 12))
    corners = torch.tensor([[3, 12]] * 4)
    assert torch.equal(fixed.apply(images), fixed.apply(images, corners=corners))
    window = crop(fixed.apply(images), fixed.size, corners)[0]
    assert torch.equal(window[:, fixed.mask], fixed.texture[:, fixed.mask])
    assert torch.equal(window[:, ~fixed.mask], crop(images, fixed.size, corners)[0][:, ~fixed.mask])

    anywhere = example(4)
    first, again, other = (anywhere.apply(images, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(UsageError, match="give a generator"):
        anywhere.apply(images)


def test_a_patch_that_does_not_fit_the_images():
    with pytest.raises(UsageError, match="8x8 patch is larger than the 4x4 image"):
        example().apply(torch.rand(1, 3, 4, 4), generator=generator(0))
    with pytest.raises(UsageError, match="does not fit at row 9, column 0"):
        example(place=(9, 0)).apply(torch.rand(1, 3, 16, 16))


def test_keep_out_is_saved_and_followed(tmp_path):
    patch = replace(example(4), keep_out=(4, 4, 8, 8))
    loaded = Patch.load(patch.save(tmp_path / "a"))
    assert loaded.keep_out == (4, 4, 8, 8)
    images = torch.rand(200, 3, 16, 16, generator=generator(0, "images"))
    patched = loaded.apply(images, generator=generator(0))
    assert torch.equal(patched[..., 4:12, 4:12], images[..., 4:12, 4:12])


def test_files_without_keep_out_are_read(tmp_path):
    assert Patch.load(altered(tmp_path)).keep_out is None


def test_facts_are_added_to_the_meta():
    patch = example().with_meta(source={"name": "net", "fingerprint": "ab", "precision": "4"})
    assert patch.meta["source"]["precision"] == "4"
    assert patch.meta["attack"] == "lavan"
    assert patch.to("cpu").meta == patch.meta


def test_a_texture_off_the_grid_is_refused():
    for wrong in (torch.full((3, 4, 4), 0.3), torch.full((3, 4, 4), 2.0), torch.full((3, 4, 4), torch.nan)):
        with pytest.raises(UsageError, match=r"give fake_quantize\(texture, 8\)"):
            Patch(texture=wrong, mask=shape_mask("square", 4))


def test_texture_and_mask_must_go_together():
    with pytest.raises(UsageError, match="do not match"):
        Patch(texture=torch.zeros(3, 4, 4), mask=shape_mask("square", 5))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no patch file"):
        Patch.load(tmp_path / "missing.safetensors")


def test_a_truncated_file_is_refused(tmp_path):
    path = example().save(tmp_path / "a")
    whole = path.read_bytes()
    for length in (0, 4, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            Patch.load(path)


def test_a_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").mkdir, ())

    path = tmp_path / "trap.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Patch.load(path)
    assert not (tmp_path / "sprung").exists()


def test_a_file_of_another_kind_is_refused(tmp_path):
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a patch file"):
        Patch.load(tmp_path / "model.safetensors")


def altered(tmp_path, **header):
    path = example().save(tmp_path / "a")
    facts = {"format": FORMAT, "version": "1", "place": '"random"', "meta": json.dumps(META), **header}
    save_file(load_file(path), path, metadata=facts)
    return path


def test_a_file_of_a_newer_version_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"'2'.*up to 1"):
        Patch.load(altered(tmp_path, version="2"))


@pytest.mark.parametrize("header", [{"meta": "{"}, {"place": "7"}, {"place": '["a", "b"]'}, {"keep_out": "[1, 2]"}])
def test_a_damaged_header_is_refused(tmp_path, header):
    with pytest.raises(CheckpointError, match="is damaged"):
        Patch.load(altered(tmp_path, **header))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "patch.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot write"):
        example().save(tmp_path / "patch")
