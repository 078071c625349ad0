"""The training loop: a recipe becomes a run directory."""

from qadtr_brevitas.train.loop import train

__all__ = ["train"]
