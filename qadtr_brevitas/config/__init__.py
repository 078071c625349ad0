"""Recipes: one YAML file describes a run completely. Checking a recipe imports the plug-ins that it names.

Names are imported when they are first used, because listing recipes needs neither pydantic nor a YAML parser.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qadtr_brevitas.config.load import load_recipe as load_recipe
    from qadtr_brevitas.config.load import load_recorded_recipe as load_recorded_recipe
    from qadtr_brevitas.config.load import make_recipe as make_recipe
    from qadtr_brevitas.config.recipe import Recipe as Recipe
    from qadtr_brevitas.config.sections import CalibrationSection as CalibrationSection
    from qadtr_brevitas.config.sections import DataSection as DataSection
    from qadtr_brevitas.config.sections import MasksSection as MasksSection
    from qadtr_brevitas.config.sections import ModelSection as ModelSection
    from qadtr_brevitas.config.sections import OptimizerSection as OptimizerSection
    from qadtr_brevitas.config.sections import QuantSection as QuantSection
    from qadtr_brevitas.config.sections import SchedulerSection as SchedulerSection
    from qadtr_brevitas.config.sections import TrainSection as TrainSection
    from qadtr_brevitas.config.slots import slot_name as slot_name

_HOMES = {
    "load_recipe": "load",
    "load_recorded_recipe": "load",
    "make_recipe": "load",
    "CalibrationSection": "sections",
    "DataSection": "sections",
    "MasksSection": "sections",
    "ModelSection": "sections",
    "OptimizerSection": "sections",
    "QuantSection": "sections",
    "Recipe": "recipe",
    "SchedulerSection": "sections",
    "TrainSection": "sections",
    "slot_name": "slots",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
