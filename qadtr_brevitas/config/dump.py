"""Recipes as YAML."""

from __future__ import annotations

from io import StringIO
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import SingleQuotedScalarString

from qadtr_brevitas.config.problems import fields_of


class _Representer(RoundTripRepresenter):
    """Writes null as a word, where ruamel would write nothing."""

    def represent_none(self, data: None) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def dump_yaml(recipe: BaseModel, *, describe: bool = False) -> str:
    """Return a recipe as YAML with every key; reading it gives an equal recipe.

    Args:
        recipe: the recipe.
        describe: write the description of each key beside it.
    """
    yaml = YAML()
    yaml.width = 10_000
    yaml.Representer = _Representer
    text = StringIO()
    yaml.dump(_node(recipe.model_dump(mode="json"), recipe if describe else None), text)
    return text.getvalue()


def _node(value: Any, owner: Any) -> Any:
    """Values as ruamel's nodes; `owner`, where given, is the section or plug-in whose descriptions are added."""
    if isinstance(value, dict):
        node = CommentedMap({key: _node(item, getattr(owner, key, None)) for key, item in value.items()})
        for key, field in fields_of(type(owner)).items() if owner is not None else ():
            if field.description and not (isinstance(value.get(key), dict) and value[key]):
                node.yaml_add_eol_comment(field.description, key, column=40)
        if not value:
            node.fa.set_flow_style()
        return node
    if isinstance(value, list):
        node = CommentedSeq(_node(item, None) for item in value)
        if not any(isinstance(item, (dict, list)) for item in value):
            node.fa.set_flow_style()
        return node
    # Quoted, because YAML 1.1 readers take these words for booleans.
    return SingleQuotedScalarString(value) if value in ("no", "yes", "on", "off", "n", "y") else value
