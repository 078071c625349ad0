"""The networks of a study: one for each model, seed and, for models with `each`, precision."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

from pydantic import JsonValue

from qadtr_brevitas.config import Recipe, load_recipe
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.files import fingerprint_facts, fingerprint_file
from qadtr_brevitas.core.precision import Precision, parse_precisions
from qadtr_brevitas.pipeline.checkpoint import read_info
from qadtr_brevitas.pipeline.directories import WEIGHTS_FILE, resolve_model_dir
from qadtr_brevitas.quant.inference import InferenceMode
from qadtr_brevitas.reproduce.study.references import OWN
from qadtr_brevitas.reproduce.study.sections import Study, StudyAttack, StudyModel

_KEY_LENGTH = 12


# Compared by identity, because recipes hold mappings, which have no hash.
@dataclass(frozen=True, eq=False)
class StudyNetwork:
    """One network of a study.

    Args:
        name: its name in reports: the model's name, with precision and seed if the model has several.
        model: name of the model it belongs to.
        section: that model.
        seed: training seed; None for a finished model.
        recipe: the recipe, without the weights to start from; None for a finished model.
        recipe_name: name of the recipe.
        only_precision: its precision, if it has one of its model's `each`; None if it has several precisions.
        start: the network whose 32-bit weights it starts from.
    """

    name: str
    model: str
    section: StudyModel
    seed: int | None
    recipe: Recipe | None
    recipe_name: str
    only_precision: Precision | None
    start: StudyNetwork | None

    @cached_property
    def key(self) -> str:
        """The fingerprint of everything that decides its weights, independent of the study and of its folder."""
        if self.recipe is None:
            return fingerprint_file(resolve_model_dir(self.section.path or "") / WEIGHTS_FILE, facts="finished")
        start = self.start and self.start.key
        return fingerprint_facts(
            ["trained" if self.section.train else "converted", self.recipe.model_dump(mode="json"), start]
        )

    def folder(self, work: Path) -> Path:
        """Return its run or model directory, for the folder that studies share."""
        if self.section.path is not None:
            return Path(self.section.path).expanduser()
        kind = "runs" if self.section.train else "models"
        return work / kind / f"{Path(self.recipe_name).stem}-{self.key[:_KEY_LENGTH]}"

    @cached_property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions it can be switched to."""
        if self.recipe is not None:
            return self.recipe.quant.precisions
        return parse_precisions(read_info(self.section.path or "").quant["precisions"])

    def scored_modes(self, study: Study) -> tuple[InferenceMode, ...]:
        """Return the precisions it is scored at: those that the study asks for and that it has."""
        if self.only_precision is not None:
            return (InferenceMode((self.only_precision,)),)
        wanted = self.section.precisions or study.precisions
        return tuple(mode for mode in wanted if set(mode.precisions) <= set(self.precisions))


@dataclass(frozen=True)
class StudyNetworks:
    """All networks of a study.

    Args:
        study: the study.
        by_name: the networks by name.
    """

    study: Study
    by_name: Mapping[str, StudyNetwork]

    def of_models(self, models: Sequence[str]) -> list[StudyNetwork]:
        """Return the networks of some models; without models, those of all models that are scored."""
        wanted = models or [name for name, model in self.study.models.items() if model.scored]
        return [network for name in wanted for network in self.by_name.values() if network.model == name]

    def counterparts(self, network: StudyNetwork, models: Sequence[str]) -> list[StudyNetwork]:
        """Return one network of each other model to compare with, of the same seed and precision if possible."""
        found: list[StudyNetwork] = []
        for name in models:
            networks = [other for other in self.of_models([name]) if other is not network]
            same_precision = [n for n in networks if n.only_precision == network.only_precision] or networks
            same_seed = [other for other in same_precision if other.seed == network.seed] or same_precision
            found += same_seed[:1] if network.model != name else []
        return found

    def attack_sources(self, network: StudyNetwork, attack: StudyAttack) -> list[StudyNetwork]:
        """Return the networks that an attack on a network is made on, of the same seed if there are several seeds."""
        found: list[StudyNetwork] = []
        for name in attack.made_on or (OWN,):
            networks = [network] if name == OWN else self.of_models([name])
            found += [other for other in networks if other.seed == network.seed] or networks[:1]
        return list(dict.fromkeys(found))


def make_networks(study: Study) -> StudyNetworks:
    """Return all networks of a study.

    Raises:
        UsageError, RecipeError: a recipe does not exist or is wrong, a network cannot start as the model says, or two
            models have networks of the same name.
        CheckpointError: a finished model does not exist.
    """
    found: dict[str, StudyNetwork] = {}
    for model in TopologicalSorter(study.starts()).static_order():
        for network in _networks_of(study, model, found):
            other = found.setdefault(network.name, network)
            if other.model != model:
                raise UsageError(
                    f"models {other.model} and {model} of the study both have a network called {network.name}, which "
                    "is a model's name with its precision and seed if it has several: rename one of the models"
                )
    return StudyNetworks(study, found)


def _networks_of(study: Study, model: str, made: Mapping[str, StudyNetwork]) -> Iterator[StudyNetwork]:
    section = study.models[model]
    if section.path is not None:
        yield StudyNetwork(model, model, section, None, None, "", None, None)
        return
    seeds = section.seeds or study.seeds
    for seed in seeds:
        for precision in section.each or (None,):
            words = [model, *([str(precision)] if precision else []), *([f"s{seed}"] if len(seeds) > 1 else [])]
            recipe_name = "+".join(filter(None, (section.recipe or study.recipe, section.defense)))
            recipe = _load(study, model, recipe_name, seed, precision)
            start = _start(study, model, seed, precision, made)
            yield StudyNetwork("-".join(words), model, section, seed, recipe, recipe_name, precision, start)


def _load(study: Study, model: str, recipe_name: str, seed: int, precision: Precision | None) -> Recipe:
    only: dict[str, JsonValue] = {"quant.precisions": [str(precision)]} if precision else {}
    settings: dict[str, JsonValue] = {**study.set, **study.models[model].set, **only, "seed": seed}
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    try:
        return load_recipe(recipe_name, overrides)
    except UsageError as error:
        raise UsageError(f"model {model} of the study, made by {recipe_name} with changes:\n{error}") from error


def _start(
    study: Study, model: str, seed: int, precision: Precision | None, made: Mapping[str, StudyNetwork]
) -> StudyNetwork | None:
    """Return the network to start from: that of the same seed and precision if the start has several."""
    start = study.start_of(model)
    if start is None:
        return None
    networks = [network for network in made.values() if network.model == start]
    alike = [network for network in networks if network.only_precision in (None, precision)]
    if not alike:
        raise UsageError(
            f"model {model} of the study starts from {start}, which has no network of the same precision: give another "
            "start"
        )
    same_seed = [network for network in alike if network.seed == seed]
    return (same_seed or alike)[0]
