import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from qadtr_brevitas.attacks.own_patch import read_picture, read_tensors, scaled
from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.core.seeding import generator


def sticker(path, *, side=40, mode="RGBA"):
    """A red disc of 20 pixels, 10 from the left and 5 from above, on green: transparent, if the mode has that."""
    picture = Image.new("RGBA", (side, side), (0, 255, 0, 0))
    ImageDraw.Draw(picture).ellipse((10, 5, 29, 24), fill=(255, 0, 0, 255))
    picture.convert(mode).save(path)
    return path


def test_transparency_is_the_shape_and_is_cut_off(tmp_path):
    patch = read_picture(sticker(tmp_path / "sticker.png"))
    assert patch.size == (20, 20)
    assert 0.7 * 400 < patch.pixels < 0.85 * 400
    assert not patch.mask[0, 0]
    assert patch.mask[10, 10]
    assert (patch.texture[:, patch.mask] == torch.tensor([1.0, 0, 0])[:, None]).all()
    assert (patch.meta["attack"], patch.meta["target"], patch.place) == ("sticker", None, "random")


def test_a_jpeg_is_a_rectangle(tmp_path):
    Image.new("RGB", (6, 4), (10, 20, 30)).save(tmp_path / "photo.jpg")
    patch = read_picture(tmp_path / "photo.jpg")
    assert (patch.size, patch.pixels) == ((4, 6), 24)


def test_a_png_with_a_background_is_refused_and_one_without_is_a_rectangle(tmp_path):
    with pytest.raises(CheckpointError, match=r"disc\.png has no transparency.*alpha.*JPEG"):
        read_picture(sticker(tmp_path / "disc.png", mode="RGB"))
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    patch = read_picture(tmp_path / "noise.png")
    assert patch.pixels == 35
    assert torch.equal((patch.texture * 255).round().byte(), torch.from_numpy(noise).permute(2, 0, 1))


def test_pictures_that_are_no_patch_are_named(tmp_path):
    Image.new("RGBA", (4, 4)).save(tmp_path / "nothing.png")
    (tmp_path / "broken.png").write_bytes(b"PNG")
    for name, words in (("nothing", "transparent everywhere"), ("broken", "cannot read"), ("gone", "no picture")):
        with pytest.raises(CheckpointError, match=f"{words}|{name}.*{words}"):
            read_picture(tmp_path / f"{name}.png")


@pytest.mark.parametrize(("size", "shape"), [(10, (10, 10)), ((5, 30), (5, 5)), (80, (80, 80)), (1, (1, 1))])
def test_it_is_scaled_in_its_proportions_and_nothing_bleeds_in(tmp_path, size, shape):
    patch = read_picture(sticker(tmp_path / "sticker.png"))
    small = scaled(patch, size)
    assert small.size == shape
    if shape[0] > 4:
        assert small.pixels / patch.pixels == pytest.approx(shape[0] * shape[1] / 400, rel=0.1)
    # The green that lies under the transparency does not show.
    assert small.texture[1, small.mask].max() < 0.01


def test_published_patches_keep_their_targets(tmp_path):
    patches = (torch.rand(3, 3, 5, 4, generator=generator(0)) * 255).round() / 255
    save_file({"patches": patches, "targets": torch.tensor([7, 1, 9])}, tmp_path / "set.safetensors")
    found = read_tensors(tmp_path / "set.safetensors")
    assert [patch.meta["target"] for patch in found] == [7, 1, 9]
    assert all(torch.equal(patch.texture, texture) for patch, texture in zip(found, patches, strict=True))
    mask = torch.zeros(3, 5, 4)
    mask[:, 1] = 1
    save_file({"patches": (patches * 255).byte(), "masks": mask}, tmp_path / "set.safetensors")
    assert [patch.pixels for patch in read_tensors(tmp_path / "set.safetensors")] == [4, 4, 4]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"conv.weight": torch.zeros(2, 3)}, r"conv\.weight \(2, 3\).*patches"),
        ({"patches": torch.full((1, 3, 2, 2), 2.0)}, r"not in \[0, 1\].*255"),
        ({"patches": torch.zeros(2, 3, 2, 2), "targets": torch.zeros(3)}, "one target for each of its 2"),
        ({"patches": torch.zeros(2, 3, 2, 2), "masks": torch.zeros(2, 2, 3)}, "one mask"),
    ],
)
def test_other_tensor_files_are_refused(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "set.safetensors")
    with pytest.raises(CheckpointError, match=words):
        read_tensors(tmp_path / "set.safetensors")
