import copy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.attacks.random_patch import RandomPatch
from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.quant import convert, folded_norms
from tests.attacks.support import attacked, corners_of, spy, target_rate

FAST = {"size": 5, "steps": 60, "batch_size": 32, "check_every": 20}


def fit(toy, *, seed=0, images=None, progress=None, **fields):
    attack = Lavan(**{**FAST, **fields})
    pool = toy.images if images is None else images
    return attack.fit(toy.model, pool, toy.labels, held_out=toy.held_out, seed=seed, progress=progress)


def noise(toy, **fields):
    return RandomPatch(size=5, **fields).fit(toy.model, toy.images, toy.labels, held_out=toy.held_out, seed=0)


@pytest.mark.parametrize("target", [0, 2])
@pytest.mark.parametrize("step_rule", ["sgd", "sign", "adam"])
def test_a_targeted_patch_beats_noise_by_far(toy, target, step_rule):
    patch = fit(toy, target=target, step_rule=step_rule)
    assert toy.success_rate(patch, target) > toy.success_rate(noise(toy), target) + 0.4
    assert patch.meta["threat_model"] == "universal targeted"


@pytest.mark.parametrize("loss", ["logits", "cross-entropy", "margin"])
def test_every_loss_raises_the_target(toy, loss):
    assert toy.success_rate(fit(toy, target=1, loss=loss), 1) > toy.success_rate(noise(toy), 1) + 0.4


@pytest.mark.slow
def test_a_patch_made_in_bfloat16_is_as_strong(toy):
    model = convert(copy.deepcopy(toy.model), [32], mean=(0, 0, 0), std=(1, 1, 1), image_size=(16, 16))
    model.eval()
    rates = []
    for bf16 in (False, True):
        with folded_norms(model, toy.test[0][:2].float() / 255, bf16=bf16) as folding:
            assert folding.bf16 is bf16
            patch = fit(replace(toy, model=model), target=1)
        rates.append(toy.success_rate(patch, 1))
    assert rates[1] == pytest.approx(rates[0], abs=0.1)


def test_an_untargeted_patch_lowers_accuracy(toy):
    patch = fit(toy, target=None)
    assert toy.success_rate(patch, None) > toy.success_rate(noise(toy), None) + 0.4
    assert patch.meta["threat_model"] == "universal untargeted"
    assert patch.meta["target"] is None


def test_a_disc_at_a_fixed_place(toy):
    patch = fit(toy, shape="disc", place=(3, 9), init="gray")
    assert patch.pixels == 21
    assert patch.place == (3, 9)
    assert (patch.texture[:, ~patch.mask] == 128 / 255).all()
    assert toy.success_rate(patch, 0) > toy.success_rate(noise(toy, shape="disc", place=(3, 9)), 0) + 0.3


def test_the_same_seed_gives_the_same_patch(toy):
    first, again, other = (fit(toy, steps=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.texture, again.texture)
    assert not torch.equal(first.texture, other.texture)


def test_images_of_the_target_class_are_not_used(toy):
    changed = toy.images.clone()
    changed[toy.labels == 2] = 0
    fields = {"target": 2, "steps": 10, "init": "uniform"}
    assert torch.equal(fit(toy, **fields).texture, fit(toy, **fields, images=changed).texture)


def test_float_and_8_bit_images_give_the_same_patch(toy):
    as_float = fit(toy, steps=10, images=toy.images.float() / 255)
    assert torch.equal(fit(toy, steps=10).texture, as_float.texture)


def test_the_patch_lies_at_a_new_place_in_every_image_and_step(toy):
    seen = []

    def spy(images):
        if images.requires_grad:
            seen.append(images.detach())
        return toy.model(images)

    flat = torch.zeros_like(toy.images)
    Lavan(**{**FAST, "steps": 40, "check_every": 100, "init": "gray"}).fit(
        spy, flat, toy.labels, held_out=toy.held_out, seed=0
    )
    covered = torch.cat(seen).sum(1) > 0
    rows, columns = covered.any(2).float().argmax(1), covered.any(1).float().argmax(1)
    # Separate draws: a single one used for both would leave all patches on the diagonal.
    assert len(torch.stack([rows, columns], 1).unique(dim=0)) == 12 * 12


def test_the_network_gets_no_gradients_and_keeps_its_weights(toy):
    before = [parameter.clone() for parameter in toy.model.parameters()]
    fit(toy, steps=3)
    for parameter, old in zip(toy.model.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, old)


def test_restarts_keep_the_best(toy):
    one = fit(toy, steps=10, target=1)
    three = fit(toy, steps=10, target=1, restarts=3)
    assert three.meta["held_out_asr"] >= one.meta["held_out_asr"]


def test_progress_counts_all_steps(toy):
    reports = []
    fit(toy, steps=4, restarts=2, progress=lambda done, total, note="": reports.append((done, total, note)))
    assert [done for done, _, _ in reports] == list(range(1, 9))
    assert {total for _, total, _ in reports} == {8}
    assert "held-out ASR" in reports[-1][2]


def test_a_saved_patch_scores_the_same(toy, tmp_path):
    patch = fit(toy, steps=20)
    assert toy.success_rate(Patch.load(patch.save(tmp_path / "a")), 0) == toy.success_rate(patch, 0)
    assert patch.meta["settings"] == Patch.load(tmp_path / "a").meta["settings"]


def test_the_default_budget_is_a_sixteenth_of_the_pixels(toy):
    assert fit(toy, size=None, steps=1).size == (4, 4)
    assert fit(toy, size=None, area=0.25, steps=1).size == (8, 8)
    assert fit(toy, size=(3, 6), shape="rectangle", steps=1).size == (3, 6)


def test_bad_requests(toy):
    with pytest.raises(UsageError, match="20x20 patch is larger than the 16x16 image"):
        fit(toy, size=20)
    with pytest.raises(UsageError, match="does not fit at row 12"):
        fit(toy, place=(12, 0))
    with pytest.raises(UsageError, match=r"7.*0 to 3"):
        fit(toy, target=7)
    only = toy.labels == 1
    with pytest.raises(DataError, match="of the target class"):
        Lavan(size=5, target=1).fit(toy.model, toy.images[only], toy.labels[only], held_out=toy.held_out, seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 4, "area": 0.1}, "give only one of them"),
        ({"shape": "rectangle", "size": 4}, "a rectangle needs size"),
        ({"size": (4, 4)}, "a square needs a single size"),
        ({"area": 1.5}, "less than or equal to 1"),
        ({"step_rule": "rmsprop"}, "'sgd', 'sign' or 'adam'"),
        ({"stepz": 5}, "stepz"),
        ({"place": (-1, 0)}, "greater than or equal to 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValidationError, match=message):
        Lavan(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("step_rule", ["sgd", "sign", "adam"])
def test_a_patch_for_every_image_raises_the_target_by_every_rule(toy, step_rule):
    attack = Lavan(size=4, steps=40, target=2, step_rule=step_rule)
    assert target_rate(toy, attacked(toy, attack), 2) > target_rate(toy, attacked(toy, RandomPatch(size=4)), 2) + 0.4


@pytest.mark.parametrize("loss", ["logits", "cross-entropy", "margin"])
@pytest.mark.parametrize("fields", [{"init": "gray"}, {"place": (5, 5)}, {"shape": "disc", "size": 5}])
def test_a_patch_for_every_image_by_every_loss(toy, loss, fields):
    attack = Lavan(**{"size": 4, "steps": 40, "target": 2, "loss": loss, **fields})
    assert target_rate(toy, attacked(toy, attack), 2) > 0.3


def test_a_patch_for_every_image_lies_at_one_place_of_its_own_throughout(toy):
    seen = []
    images, labels = torch.zeros(200, 3, 16, 16), torch.zeros(200, dtype=torch.long)
    Lavan(size=4, steps=5, target=1, init="gray").run(
        spy(toy.model, seen), images, labels, generator=torch.Generator().manual_seed(0)
    )
    places = [corners_of(batch) for batch in seen]
    assert all(torch.equal(place, places[0]) for place in places)
    # Separate draws of row and column: one for both would leave all patches on the diagonal.
    assert len(places[0].unique(dim=0)) > 100
