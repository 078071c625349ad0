"""What a page consists of, before it is written as HTML, Markdown or CSV."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qadtr_brevitas.evaluation.report.layout import Table


@dataclass(frozen=True)
class Image:
    """A picture.

    Args:
        png: its bytes.
        caption: what it shows.
        path: its file, where it lies in a folder that was given.
    """

    png: bytes
    caption: str
    path: Path | None = None


@dataclass(frozen=True)
class Block:
    """A table or a picture, or both of the same figures, with what has to be known to believe them.

    Args:
        table: the figures.
        image: a picture of them.
        warnings: what the audit says against them, each one sentence.
        folded: shown on demand only.
    """

    table: Table | None = None
    image: Image | None = None
    warnings: tuple[str, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class PageSection:
    """One evaluation, analysis or comparison.

    Args:
        title: what it is.
        facts: how it was made: command, recipes, seed, versions and the like, name -> text.
        blocks: its tables and pictures.
        remarks: what the paper leaves open, and where it contradicts itself.
        level: 2 for a section, 3 for a part of a study.
        recipes: what its models were trained by: their names -> the recipe.
    """

    title: str
    facts: dict[str, str]
    blocks: tuple[Block, ...]
    remarks: tuple[str, ...] = ()
    level: int = 2
    recipes: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Page:
    """The whole page."""

    title: str
    sections: tuple[PageSection, ...]
    facts: dict[str, str] = field(default_factory=dict[str, str])
