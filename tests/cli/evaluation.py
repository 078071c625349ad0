"""`evaluate` on the command line, and what makes models for it."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.evaluation.craft import CraftSetup, craft
from qadtr_brevitas.evaluation.entries import load_models
from tests.evaluation.models import make_model_dir, train_split

NOISE = "{name: a-qapa, steps: 0, sizes: [4], quantize_image: false}"


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


def make_runs(folder: Path) -> list[Path]:
    """Return two model directories with patches of two classes each."""
    paths = [make_model_dir(folder / name, name=seed) for seed, name in enumerate(("first", "second"))]
    judge, rest = train_split().divide(30, seed=0)
    for subject, path in zip(load_models(paths), paths, strict=True):
        search = Lavan(size=4, steps=1, batch_size=16)
        setup = CraftSetup(train=rest, held_out=judge, output=path / "patches")
        craft(subject, search, setup, name="lavan", targets=[0, 1])
    return paths
