"""A recipe as YAML text."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import SingleQuotedScalarString

from qadtr_brevitas.recipe.problems import fields_of

if TYPE_CHECKING:
    from qadtr_brevitas.recipe.sections import Recipe


class _Representer(RoundTripRepresenter):
    """Writes null in full, where ruamel leaves the value out."""

    def represent_none(self, data: None) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def dump_yaml(recipe: Recipe, *, describe: bool = False) -> str:
    """The recipe with every key written out; reading it again gives an equal recipe."""
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
