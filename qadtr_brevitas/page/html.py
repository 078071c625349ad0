"""A page as one HTML file that needs nothing else: no scripts, no fonts, no files beside it."""

from __future__ import annotations

from base64 import b64encode
from importlib.resources import files

from qadtr_brevitas.page.blocks import Page


def html(page: Page) -> str:
    """The page as HTML; whatever names and captions hold is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["data_uri"] = _data_uri
    template = files("qadtr_brevitas.page").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(page=page)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"
