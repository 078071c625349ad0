import pytest
import torch

from qadtr_brevitas.data.augment import crop_and_flip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("flip", [True, False])
def test_every_result_is_one_of_the_possible_crops(dtype: torch.dtype, flip: bool) -> None:
    images = torch.randint(1, 255, (40, 3, 5, 6), generator=generator()).to(dtype)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    out = crop_and_flip(images, padding=2, flip=flip, generator=generator())
    assert out.dtype == dtype
    assert out.shape == images.shape
    seen = set()
    for index, image in enumerate(out):
        for mirrored in (False, True):
            wanted = image.flip(-1) if mirrored else image
            places = [
                (mirrored, y, x)
                for y in range(5)
                for x in range(5)
                if torch.equal(padded[index, :, y : y + 5, x : x + 6], wanted)
            ]
            seen.update(places)
            if places:
                break
        else:
            pytest.fail(f"image {index} is no crop of its original")
    assert len({place[1:] for place in seen}) > 10
    assert {place[0] for place in seen} == ({False, True} if flip else {False})


def test_the_generator_decides() -> None:
    images = torch.rand(8, 3, 8, 8)
    first, again, other = (crop_and_flip(images, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_padding_and_no_flip_change_nothing() -> None:
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(crop_and_flip(images, padding=0, flip=False, generator=generator()), images)
