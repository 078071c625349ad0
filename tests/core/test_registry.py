import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from qadtr_brevitas.config import load_recipe, slot_name
from qadtr_brevitas.core import registry
from qadtr_brevitas.core.errors import PluginError, RecipeError, UsageError
from qadtr_brevitas.core.registry import REGISTRIES, Registry
from qadtr_brevitas.training.schedules import Fixed

BUILTIN = [(kind, name) for kind, found in REGISTRIES.items() for name in found.builtin]
MODULE = """
from tests.core.test_registry import Noisy, Toy

class Good(Toy):
    def play(self): ...

class WithoutBase:
    def play(self): ...

class WithoutMethod(Toy):
    pass

class WithoutKey(Noisy):
    def play(self): ...
"""


class Toy(ABC):
    """The contract of toys."""

    @abstractmethod
    def play(self) -> None:
        """Play."""


class Noisy(Toy):
    """A toy with an ability."""

    required_keys = ("volume",)


@dataclasses.dataclass(frozen=True)
class Bell(Noisy):
    """A toy that has the key its ability needs."""

    volume: float = 1.0

    def play(self) -> None:
        """Play."""


class BuiltIn(Toy):
    """A toy."""

    def play(self) -> None:
        """Play."""


AddPlugins = Callable[..., None]


@pytest.fixture
def add_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AddPlugins]:
    """Declares entry points of a package with the modules `toys` and `broken`."""
    (tmp_path / "toys.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("raise RuntimeError('no display')\n")
    monkeypatch.syspath_prepend(tmp_path)

    def add(kind: str, **targets: str) -> None:
        group = f"qadtr_brevitas.{kind}"
        points = EntryPoints(EntryPoint(name, target, group) for name, target in targets.items())
        monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))
        registry._external.cache_clear()

    yield add
    registry._external.cache_clear()
    for name in ("toys", "broken"):
        sys.modules.pop(name, None)


@pytest.fixture
def toys() -> Registry:
    here = "tests.core.test_registry"
    return Registry("toy", f"{here}:Toy", {"ours": (f"{here}:BuiltIn", "built in")})


@pytest.mark.parametrize(("kind", "name"), BUILTIN, ids=lambda part: str(part))
def test_every_builtin_plugin_is_a_frozen_described_dataclass(kind: str, name: str) -> None:
    plugin = REGISTRIES[kind].load(name)
    assert dataclasses.is_dataclass(plugin)
    assert plugin.__dataclass_params__.frozen
    assert plugin.__doc__
    assert REGISTRIES[kind].describe(name)


CLASSES = [(kind, name) for kind, name in BUILTIN if isinstance(REGISTRIES[kind].load(name), type)]


@pytest.mark.parametrize(("kind", "name"), CLASSES, ids=lambda part: str(part))
def test_every_recipe_key_of_a_builtin_plugin_is_checked_and_described(kind: str, name: str) -> None:
    plugin = REGISTRIES[kind].load(name)
    assert plugin.__pydantic_config__.get("extra") == "forbid"
    fields = plugin.__pydantic_fields__.items()
    assert not [field for field, facts in fields if not facts.description]


def test_names_follow_a_pattern() -> None:
    assert REGISTRIES["attacks"].names("*patch*") == ["adaptive-patch", "location-patch", "patch-auto", "random-patch"]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"attack 'lavn'.*'lavan'"):
        REGISTRIES["attacks"].load("lavn")


def test_a_name_of_another_tool_is_answered_with_what_to_take(add_plugins: AddPlugins, toys: Registry) -> None:
    toys = dataclasses.replace(toys, declined={"mine": "take 'ours'"})
    assert toys.names() == ["ours"]
    with pytest.raises(UsageError, match=r"toy 'mine'.*take 'ours'"):
        toys.load("mine")
    add_plugins("toy", mine="toys:Good")
    assert toys.load("mine").__name__ == "Good"


def test_channel_splitting_is_refused_with_why_and_what_to_take() -> None:
    with pytest.raises(UsageError, match=r"channel-splitting.*32 bit.*'equalize'"):
        REGISTRIES["ptq-methods"].make("channel-splitting")


def test_entry_points_add_plugins_but_replace_none(add_plugins: AddPlugins, toys: Registry) -> None:
    add_plugins("toy", mine="toys:Good", ours="nowhere:Nothing")
    assert toys.names() == ["mine", "ours"]
    assert toys.load("mine").__name__ == "Good"
    assert toys.load("ours") is BuiltIn
    assert toys.describe("mine") == "from a plug-in"


def test_a_plugin_with_the_keys_of_its_ability_is_loaded(add_plugins: AddPlugins, toys: Registry) -> None:
    add_plugins("toy", mine="tests.core.test_registry:Bell")
    assert toys.load("mine") is Bell


@pytest.mark.parametrize(
    ("target", "facts"),
    [
        ("toys:WithoutBase", r"toy 'mine' \(toys:WithoutBase\).*tests\.core\.test_registry\.Toy.*base class"),
        ("toys:WithoutMethod", r"toy 'mine' \(toys:WithoutMethod\).*play.*tests\.core\.test_registry\.Toy"),
        ("toys:WithoutKey", r"toy 'mine'.*Noisy.*volume"),
        ("toys:Absent", r"toy 'mine'.*toys:Absent.*Absent"),
        ("nowhere:Nothing", r"toy 'mine'.*nowhere:Nothing.*No module named 'nowhere'"),
        ("broken:Toy", r"toy 'mine'.*broken:Toy.*RuntimeError: no display"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_clear_line(
    add_plugins: AddPlugins, toys: Registry, target: str, facts: str
) -> None:
    add_plugins("toy", mine=target)
    with pytest.raises(PluginError, match=facts) as error:
        toys.load("mine")
    assert "\n" not in str(error.value)


def test_one_broken_plugin_does_not_break_others(add_plugins: AddPlugins) -> None:
    # Its class has the name of one of ours, and lookups by class meet it first.
    add_plugins("schedule", mine="broken:Fixed")
    assert REGISTRIES["schedules"].load("fixed") is Fixed
    assert slot_name(Fixed()) == "fixed"
    assert "mine" in REGISTRIES["schedules"].names()


def test_broken_plugins_are_left_out_of_all(add_plugins: AddPlugins, toys: Registry) -> None:
    add_plugins("toy", mine="toys:Good", broken="broken:Toy", partial="toys:WithoutMethod")
    assert list(toys.load_all()) == ["mine", "ours"]


def test_a_broken_plugin_in_a_recipe_is_named_with_its_line(add_plugins: AddPlugins, tmp_path: Path) -> None:
    add_plugins("schedule", mine="broken:Fixed")
    (tmp_path / "recipe.yaml").write_text("train:\n  precision: mine\n")
    with pytest.raises(RecipeError, match=r":2: train\.precision\.\w+: schedule 'mine'.*broken:Fixed"):
        load_recipe(tmp_path / "recipe.yaml")
