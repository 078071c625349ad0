"""Make a Jupyter notebook of a tutorial: text, commands, and the outputs and pictures that its page shows."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CELL = re.compile(
    r"^```(?P<language>bash|python|yaml)(?: title=\"(?P<title>.+?)\")?\n(?P<text>.*?)^```\n"
    r"(?:\n?<!-- picture: .+? -->\n)*"
    r"(?:\n<!-- output -->\n(?P<output>.*?)<!-- end of output -->\n)?",
    re.MULTILINE | re.DOTALL,
)
PRINTED = re.compile(r"```text\n(.*?)```", re.DOTALL)
PICTURE = re.compile(r"!\[.*?\]\((.+?)\)")
LINK = re.compile(r"\]\((?!https?:|#|attachment:)([^)]+)\)")


def notebook(page: Path, *, site: str) -> str:
    """Return a tutorial as the text of a notebook.

    Args:
        page: the tutorial.
        site: address of the folder of the tutorials, for links to other pages.
    """
    text, cells, end = page.read_text(encoding="utf-8"), list[dict[str, Any]](), 0
    for block in CELL.finditer(text):
        cells += _words(text[end : block.start()], site, page.parent)
        cells.append(_code(block, page.parent))
        end = block.end()
    cells += _words(text[end:], site, page.parent)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    numbered = [{"id": f"cell-{number}", **cell} for number, cell in enumerate(cells)]
    return json.dumps({"cells": numbered, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1)


def _words(text: str, site: str, folder: Path) -> Iterator[dict[str, Any]]:
    if not text.strip():
        return
    pictures: dict[str, Any] = {}

    def attached(picture: re.Match[str]) -> str:
        file = folder / picture[1]
        pictures[file.name] = {"image/png": _encoded(file)}
        return picture[0].replace(f"({picture[1]})", f"(attachment:{file.name})")

    source = LINK.sub(lambda link: f"]({site}/{link[1]})", PICTURE.sub(attached, text.strip()))
    yield {"cell_type": "markdown", "metadata": {}, "source": source} | ({"attachments": pictures} if pictures else {})


def _encoded(picture: Path) -> str:
    return b64encode(picture.read_bytes()).decode()


def _code(block: re.Match[str], folder: Path) -> dict[str, Any]:
    lines = block["text"].rstrip()
    if block["title"]:
        lines = f"%%writefile {block['title']}\n{lines}"
    elif block["language"] == "bash":
        lines = "\n".join(f"!{line}" for line in lines.splitlines())
    found = list(_outputs(block["output"] or "", folder))
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "source": lines, "outputs": found}


def _outputs(text: str, folder: Path) -> Iterator[dict[str, Any]]:
    for printed in PRINTED.findall(text):
        yield {"output_type": "stream", "name": "stdout", "text": printed}
    for name in PICTURE.findall(text):
        yield {"output_type": "display_data", "metadata": {}, "data": {"image/png": _encoded(folder / name)}}
