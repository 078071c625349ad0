import dataclasses
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from qadtr_brevitas.core import registry
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.registry import REGISTRIES, Registry

BUILTIN = [(kind, name) for kind, found in REGISTRIES.items() for name in found.builtin]


@pytest.mark.parametrize(("kind", "name"), BUILTIN, ids="/".join)
def test_every_builtin_plugin_is_a_frozen_described_dataclass(kind: str, name: str) -> None:
    plugin = REGISTRIES[kind].load(name)
    assert dataclasses.is_dataclass(plugin)
    assert plugin.__dataclass_params__.frozen
    assert plugin.__doc__
    assert plugin.__pydantic_config__.get("extra") == "forbid"
    fields = plugin.__pydantic_fields__.items()
    assert not [field for field, facts in fields if not facts.description], "every recipe key has a description"
    assert REGISTRIES[kind].describe(name)


def test_names_follow_a_pattern() -> None:
    assert REGISTRIES["attacks"].names("*patch*") == ["location-patch", "random-patch"]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown attack 'lavn': did you mean 'lavan'"):
        REGISTRIES["attacks"].load("lavn")


def test_entry_points_add_plugins_but_replace_none(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "qadtr_brevitas.toy"
    points = EntryPoints(
        EntryPoint(name, value, group) for name, value in [("mine", "fractions:Fraction"), ("ours", "nowhere:Nothing")]
    )
    monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))
    registry._external.cache_clear()
    toys = Registry("toy", {"ours": ("decimal:Decimal", "built in")})
    assert toys.names() == ["mine", "ours"]
    assert toys.load("mine").__name__ == "Fraction"
    assert toys.load("ours").__name__ == "Decimal"
    assert toys.describe("mine") == "from a plug-in"
    registry._external.cache_clear()
