"""The networks of a study: every model at every seed and, where it has one for each bit-width, at each of these."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qadtr_brevitas.config import Recipe, load_recipe
from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.core.files import fingerprint_facts, fingerprint_file, read_json
from qadtr_brevitas.core.precision import Precision, parse_precisions
from qadtr_brevitas.quant.inference import InferenceMode
from qadtr_brevitas.reproduce.study.file import start_of
from qadtr_brevitas.reproduce.study.sections import Study, StudyModel

_KEY_LENGTH = 12
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


# Compared by identity: recipes hold mappings, which have no hash.
@dataclass(frozen=True, eq=False)
class StudyNetwork:
    """One network of a study.

    Args:
        name: what reports call it: the model's name, with its bit-width and seed where it has several.
        model: name of the model it belongs to.
        section: that model.
        seed: of its training; None for a finished model.
        recipe: what makes it, but for the weights it starts from; None for a finished model.
        recipe_name: what the recipe is called.
        bits: the precision it alone is for; None where it is for several.
        start: the network whose 32-bit weights it starts from.
    """

    name: str
    model: str
    section: StudyModel
    seed: int | None
    recipe: Recipe | None
    recipe_name: str
    bits: Precision | None
    start: StudyNetwork | None

    @cached_property
    def key(self) -> str:
        """Of everything that makes it, whatever study asks for it and wherever its files lie."""
        if self.recipe is None:
            return fingerprint_file(_finished(self.section) / _WEIGHTS, facts="finished")
        made_of = self.recipe.model_dump(mode="json")
        start = self.start and self.start.key
        return fingerprint_facts(["trained" if self.section.train else "converted", made_of, start])

    @property
    def short_key(self) -> str:
        """The beginning of its key, for names of folders."""
        return self.key[:_KEY_LENGTH]

    def folder(self, work: Path) -> Path:
        """Its run or model directory."""
        if self.section.path is not None:
            return Path(self.section.path).expanduser()
        kind = "runs" if self.section.train else "models"
        return work / kind / f"{Path(self.recipe_name).stem}-{self.short_key}"

    @cached_property
    def precisions(self) -> tuple[Precision, ...]:
        """What it can be switched to."""
        if self.recipe is not None:
            return self.recipe.quant.precisions
        config = _finished(self.section) / _CONFIG
        try:
            return parse_precisions(read_json(config)["quant"]["precisions"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{config} is not the config of a switchable model: save the model again") from error

    def scored(self, study: Study) -> tuple[InferenceMode, ...]:
        """What it is scored at: what is asked for, as far as it has it."""
        if self.bits is not None:
            return (InferenceMode((self.bits,)),)
        wanted = self.section.precisions or study.precisions
        return tuple(mode for mode in wanted if set(mode.precisions) <= set(self.precisions))


def _finished(section: StudyModel) -> Path:
    """The model directory of a finished model: itself, or last/ of a run."""
    path = Path(section.path or "").expanduser()
    for folder in (path, path / "last"):
        if (folder / _WEIGHTS).is_file() and (folder / _CONFIG).is_file():
            return folder
    raise CheckpointError(
        f"there is no finished model in {path}: give a run or model directory, or a recipe to train it"
    )


def make_nets(study: Study) -> dict[str, StudyNetwork]:
    """All networks of a study by name; those that others start from come first.

    Raises:
        UsageError, RecipeError: a recipe that is not there or is wrong, or cannot be made as the model says, or two
            models with networks of one name.
        CheckpointError: a finished model that is not there.
    """
    found: dict[str, StudyNetwork] = {}
    for model in _in_order(study):
        for network in _nets_of(study, model, found):
            other = found.setdefault(network.name, network)
            if other.model != model:
                raise UsageError(
                    f"models {other.model} and {model} of the study both have a network called {network.name}, which "
                    "is a model's name with its bit-width and seed where it has several: rename one of the models"
                )
    return found


def _in_order(study: Study) -> list[str]:
    """The models, each after the one it starts from."""
    ordered: list[str] = []

    def add(name: str) -> None:
        start = start_of(study, name)
        if start is not None and start not in ordered:
            add(start)
        if name not in ordered:
            ordered.append(name)

    for name in study.models:
        add(name)
    return ordered


def _nets_of(study: Study, name: str, made: Mapping[str, StudyNetwork]) -> Iterator[StudyNetwork]:
    section = study.models[name]
    if section.path is not None:
        yield StudyNetwork(name, name, section, None, None, "", None, None)
        return
    seeds = section.seeds or study.seeds
    for seed in seeds:
        for bits in section.each or (None,):
            words = [name, *([str(bits)] if bits else []), *([f"s{seed}"] if len(seeds) > 1 else [])]
            recipe_name = "+".join(filter(None, (section.recipe or study.recipe, section.defense)))
            recipe = _load(study, name, section, recipe_name, seed, bits)
            start = _start(study, name, seed, bits, made)
            yield StudyNetwork("-".join(words), name, section, seed, recipe, recipe_name, bits, start)


def _load(study: Study, name: str, section: StudyModel, recipe_name: str, seed: int, bits: Precision | None) -> Recipe:
    only = {"quant.precisions": [str(bits)]} if bits else {}
    settings: dict[str, Any] = {**study.set, **section.set, **only, "seed": seed}
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    try:
        return load_recipe(recipe_name, overrides)
    except UsageError as error:
        raise UsageError(f"model {name} of the study, which is {recipe_name} with its changes:\n{error}") from error


def _start(
    study: Study, name: str, seed: int, bits: Precision | None, made: Mapping[str, StudyNetwork]
) -> StudyNetwork | None:
    """The network of the model to start from that has the same seed and bit-width, as far as there are several."""
    start = start_of(study, name)
    if start is None:
        return None
    networks = [network for network in made.values() if network.model == start]
    alike = [network for network in networks if network.bits in (None, bits)]
    if not alike:
        raise UsageError(f"model {name} of the study starts from {start}, which has no network for the same precision")
    same_seed = [network for network in alike if network.seed == seed]
    return (same_seed or alike)[0]
