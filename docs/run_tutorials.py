"""Run tutorials from their first line to their last, and write what they print, and their pictures, into their pages.

    python docs/run_tutorials.py robust own --folder FOLDER

The commands run as they stand; the first lines of what they print are kept. What FOLDER has already is not made again.
A comment `<!-- picture: runs/report/asr.png: What it shows. -->` below a block names a picture that it made.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from PIL import Image

from qadtr_brevitas.cli.main import main as command_line

DOCS = Path(__file__).parent
BLOCK = re.compile(
    r"^```(?P<language>\w+)(?: title=\"(?P<title>.+?)\")?\n(?P<text>.*?)^```\n"
    r"(?P<pictures>(?:\n?<!-- picture: .+? -->\n)*)"
    r"(?:\n<!-- output -->\n.*?<!-- end of output -->\n)?",
    re.MULTILINE | re.DOTALL,
)
PICTURE = re.compile(r"<!-- picture: (?P<file>[^:]+): (?P<caption>.+?) -->")
MOST_LINES = 28
WIDEST, COLORS = 640, 48


def render(text: str, *, name: str, folder: Path, pictures: Path) -> str:
    """Return a tutorial with the outputs of its blocks, which run in a folder.

    Args:
        text: the tutorial, with or without outputs of an earlier run.
        name: what its pictures are called.
        folder: where it runs.
        pictures: where its pictures go.
    """
    names: dict[str, Any] = {}
    numbers = iter(range(1, 100))

    def rendered(block: re.Match[str]) -> str:
        source = block.group(0).partition("\n<!-- output -->\n")[0]
        with chdir(folder):
            printed = _run(block["language"], block["title"], block["text"], names)
        parts = [f"```text\n{printed}\n```"] if printed else []
        for picture in PICTURE.finditer(block["pictures"]):
            file = pictures / f"{name}-{next(numbers)}.png"
            _save_small(folder / picture["file"], file)
            parts.append(f"![{picture['caption']}]({_link(file)})")
        if not parts:
            return source
        return source.rstrip() + "\n\n<!-- output -->\n" + "\n\n".join(parts) + "\n<!-- end of output -->\n"

    return BLOCK.sub(rendered, text)


def _run(language: str, title: str | None, text: str, names: dict[str, Any]) -> str:
    """Run a block, or write the file that it shows; return what it prints on standard output."""
    if title:
        Path(title).write_text(text, encoding="utf-8")
        return ""
    with redirect_stdout(StringIO()) as printed:
        if language == "python":
            exec(compile(text, "tutorial", "exec"), names)
        elif language == "bash":
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                if words and command_line(words[1:]) != 0:
                    raise SystemExit(f"this failed: {line}")
    # Readers have another folder.
    return "\n".join(_shortened(printed.getvalue().replace(f"{Path.cwd()}{os.sep}", "")))


def _shortened(text: str) -> Iterator[str]:
    """Yield the lines without spaces at their ends, and no more of them than one looks at."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    yield from lines[:MOST_LINES]
    if len(lines) > MOST_LINES:
        yield "..."


def _save_small(source: Path, file: Path) -> None:
    with Image.open(source) as image:
        picture = image.convert("RGB")
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(COLORS, dither=Image.Dither.NONE).save(file, optimize=True)


def _link(file: Path) -> str:
    return Path(os.path.relpath(file, DOCS / "tutorials")).as_posix()


def main() -> None:
    """Render the tutorials that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="names of tutorials, as robust")
    parser.add_argument("--folder", type=Path, required=True, help="where they run")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in given.names:
        page = DOCS / "tutorials" / f"{name}.md"
        text = render(
            page.read_text(encoding="utf-8"), name=name, folder=given.folder, pictures=DOCS / "images/tutorials"
        )
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
