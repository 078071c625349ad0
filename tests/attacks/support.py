"""Helpers of the tests of attacks on single images."""

import torch

from qadtr_brevitas.core.seeding import generator


def sample(toy, count=100):
    """Return test images in [0, 1] and labels."""
    return toy.test[0][:count].float() / 255, toy.test[1][:count]


def attacked(toy, attack, *, count=100, seed=0, model=None):
    images, labels = sample(toy, count)
    return attack.run(model or toy.model, images, labels, generator=generator(seed, "attack"))


def accuracy(toy, images):
    return (predictions(toy, images) == toy.test[1][: len(images)]).float().mean().item()


def target_rate(toy, images, target):
    labels = toy.test[1][: len(images)]
    return (predictions(toy, images) == target)[labels != target].float().mean().item()


def predictions(toy, images):
    with torch.no_grad():
        return toy.model(images).argmax(1)


def spy(model, seen):
    """Return the model, which records its inputs."""

    def recorded(images):
        seen.append(images.detach().clone())
        return model(images)

    return recorded


def corners_of(images):
    """Return row and column of the first pixel that is not black, (N, 2)."""
    covered = (images != 0).any(1)
    return torch.stack([covered.any(2).float().argmax(1), covered.any(1).float().argmax(1)], 1)
