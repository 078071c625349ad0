from typing import Any

import pytest
import torch

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.training.images import ImageSource, NormBatches
from tests.training.support import make_recipe


def make_split() -> Split:
    split: Split = make_recipe().data.dataset.load("train")
    return split


def inputs(rank: int = 0, processes: int = 1, **keys: Any) -> ImageSource:
    return ImageSource(make_recipe(**keys), make_split(), rank, processes)


def norm_batches(**keys: Any) -> NormBatches:
    return NormBatches(make_recipe(**keys), inputs(**keys))


def test_an_epoch_visits_every_image_once() -> None:
    split, source = make_split(), inputs(augment="none")
    seen = torch.cat([source.batch(step)[0] for step in range(6)])
    whole, _ = split.batch(torch.arange(len(split)))
    assert sorted(seen.flatten(1).sum(1).tolist()) == sorted(whole.flatten(1).sum(1).tolist())
    other = torch.cat([source.batch(step)[0] for step in range(6, 12)])
    assert not torch.equal(seen, other)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batch_of_one(processes: int) -> None:
    images, labels, _ = inputs(augment="none").batch(3)
    shares = [inputs(rank, processes, augment="none").batch(3) for rank in range(processes)]
    together = torch.stack([share[0] for share in shares], dim=1).flatten(0, 1)
    assert torch.equal(together, images)
    assert torch.equal(torch.stack([share[1] for share in shares], dim=1).flatten(), labels)


def test_augmentation_depends_on_seed_step_and_rank_only() -> None:
    first = inputs().batch(3)[0]
    assert torch.equal(first, inputs().batch(3)[0])
    assert not torch.equal(first, inputs(augment="none").batch(3)[0])
    one, other = (inputs(rank, 2).batch(3)[0] for rank in range(2))
    assert not torch.equal(one, other)


def test_norm_batches_are_augmented_whole_and_the_same_every_time() -> None:
    batches = norm_batches(norm_batches=4)
    assert [batch.shape for batch in batches] == [(16, 3, 8, 8)] * 4
    assert all(torch.equal(one, other) for one, other in zip(batches, batches, strict=True))
    plain = norm_batches(norm_batches=4, augment="none")
    assert not torch.equal(batches[0], plain[0])
    assert not torch.equal(plain[0], plain[1])


def test_norm_batches_are_no_more_than_the_images_fill() -> None:
    assert len(norm_batches(norm_batches=50, batch_size=40)) == 2
    assert len(norm_batches(norm_batches=0)) == 0


def with_data(recipe: Recipe, **keys: Any) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(), "data": {**recipe.data.model_dump(), **keys}})


class TestTransforms:
    def source(self, workers: int = 0, rank: int = 0, processes: int = 1, **keys: Any) -> ImageSource:
        recipe = with_data(make_recipe(), transform={"scale": None, "pad": 1, **keys}, workers=workers)
        return ImageSource(recipe, make_split(), rank, processes)

    def test_images_in_memory_are_changed_and_the_crop_of_whole_batches_is_not_added(self) -> None:
        plain = self.source(pad=0, flip=0).batch(2)
        assert torch.equal(plain.images, inputs(augment="none").batch(2).images)
        changed = self.source().batch(2)
        assert torch.equal(changed.labels, plain.labels)
        assert not torch.equal(changed.images, plain.images)

    def test_mixed_labels_reach_the_batch(self) -> None:
        batch = self.source(mixup=1.0).batch(0)
        assert batch.targets is not None
        assert torch.allclose(batch.targets.sum(dim=1), torch.ones(16))
        assert torch.equal(batch.targets.argmax(dim=1), batch.labels)
        assert torch.equal(batch.images, self.source(mixup=1.0).batch(0).images)

    def test_a_share_that_cannot_be_mixed(self) -> None:
        with pytest.raises(UsageError, match=r"batch_size=16.*16 processes.*multiple of 32"):
            self.source(rank=1, processes=16, cutmix=1.0)

    def test_batches_for_norms_are_changed_too(self) -> None:
        source = self.source()
        assert torch.equal(source.norm_batch(0), self.source(workers=1).norm_batch(0))
        assert not torch.equal(source.norm_batch(0), self.source(pad=0, flip=0).norm_batch(0))


def test_a_rand_augment_that_timm_does_not_know() -> None:
    recipe = with_data(make_recipe(), transform={"rand_augment": "random"})
    with pytest.raises(UsageError, match=r"random.*data\.transform\.rand_augment"):
        ImageSource(recipe, make_split())
