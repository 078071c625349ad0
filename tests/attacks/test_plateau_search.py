"""APGD on patches, against the official code's schedule and simple functions."""

from __future__ import annotations

import torch

from qadtr_brevitas.attacks.descent import OptimizerSteps
from qadtr_brevitas.attacks.image_streams import ImageStreams
from qadtr_brevitas.attacks.per_image import PatchTask, search_patches
from qadtr_brevitas.attacks.plateau_search import PlateauSearch, checkpoint_lengths
from qadtr_brevitas.attacks.results import AttackGoal
from qadtr_brevitas.core.seeding import generator


def task_of(model, count=4):
    labels = torch.zeros(count, dtype=torch.long)
    mask = torch.ones(4, 4, dtype=torch.bool)
    return PatchTask(
        model=model, images=torch.zeros(count, 3, 4, 4), mask=mask, goal=AttackGoal.of(None, labels, loss="margin")
    )


def bowl(goal):
    """A loss that is the squared distance to a patch, and never a success."""

    def model(images):
        distance = (images - goal).square().sum((1, 2, 3))
        return torch.stack([1 + distance, torch.zeros(len(images))], 1)

    return model


def run(model, *, steps, count=4):
    search = PlateauSearch(
        task=task_of(model, count), allowed=None, steps=steps, streams=ImageStreams.of(0, range(count))
    )
    start = torch.rand(count, 3, 4, 4, generator=generator(0, "start"))
    return search.run(start, torch.zeros(count, 2, dtype=torch.long)), start


def test_checkpoints_are_those_of_the_paper():
    # p = 0, 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99 (Croce & Hein 2020, section 3.2).
    marks = [0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99]
    assert [at for at, _ in checkpoint_lengths(1000)] == [round(1000 * mark) for mark in marks]
    assert sum(length for _, length in checkpoint_lengths(1000)) == 990


def test_halved_steps_end_nearer_to_the_minimum_than_constant_ones():
    goal = torch.rand(3, 4, 4, generator=generator(0, "goal")) * 0.6 + 0.2
    found, start = run(bowl(goal), steps=60)
    plain = search_patches(
        task_of(bowl(goal)).assess,
        start,
        torch.zeros(4, 2, dtype=torch.long),
        rule=OptimizerSteps(steps=60, step_rule="sign", lr=0.05),
        steps=60,
    )
    assert (found.losses < plain.losses).all()
    assert (found.losses - 1 < 0.02).all()


def test_the_best_patch_is_returned_with_its_loss():
    goal = torch.full((3, 4, 4), 0.5)
    found, _ = run(bowl(goal), steps=15)
    task = task_of(bowl(goal))
    torch.testing.assert_close(task.judge(found.images).losses, found.losses)


def test_broken_images_are_left_out():
    sizes = []

    def model(images):
        sizes.append(len(images))
        # The first image of each full batch is out of reach.
        far = (torch.arange(len(images)) == 0).float() * 100
        light = images.mean((1, 2, 3))
        return torch.stack([0.9 - light + far, light], 1)

    found, _ = run(model, steps=20)
    assert sizes[0] == 4
    assert sizes[-1] == 1
    assert found.success.tolist() == [False, True, True, True]
