"""The parts of a page, before it is written as HTML, Markdown or CSV."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qadtr_brevitas.auditing.headline import Headline
from qadtr_brevitas.core.table import Table


@dataclass(frozen=True)
class PageImage:
    """A picture.

    Args:
        png: the bytes of the PNG file.
        caption: what it shows.
        path: the file, if it is one of an input; None for a picture of the page itself.
    """

    png: bytes
    caption: str
    path: Path | None = None


@dataclass(frozen=True)
class PageBlock:
    """A table, a picture, or both of the same numbers, with warnings about them.

    Args:
        table: the numbers.
        image: a picture of them.
        warnings: sentences of an audit about the numbers.
        folded: whether it is shown on demand only.
    """

    table: Table | None = None
    image: PageImage | None = None
    warnings: tuple[str, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class PageSection:
    """One evaluation, analysis or comparison.

    Args:
        title: its title.
        facts: how it was made: command, recipes, seed, versions and the like, by name.
        blocks: its tables and pictures.
        remarks: what the paper leaves open, and where it contradicts itself.
        level: level of its heading: 2, or 3 for a part of a study.
        recipes: the recipes of its models: names of the models -> text.
        headline: what it says, in short; stands above everything else.
    """

    title: str
    facts: Mapping[str, str]
    blocks: tuple[PageBlock, ...]
    remarks: tuple[str, ...] = ()
    level: int = 2
    recipes: Mapping[str, str] = field(default_factory=dict[str, str])
    headline: Headline | None = None

    @property
    def shown(self) -> tuple[PageBlock, ...]:
        """The blocks to read first."""
        return tuple(block for block in self.blocks if not block.folded)

    @property
    def folded(self) -> tuple[PageBlock, ...]:
        """The blocks that are shown on demand."""
        return tuple(block for block in self.blocks if block.folded)


@dataclass(frozen=True)
class Page:
    """The whole page."""

    title: str
    sections: tuple[PageSection, ...]
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
