"""What the tutorials show of their outputs: made by docs/run_tutorials.py, of the commands that stand above it."""

from __future__ import annotations

import json
import re
import runpy
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
MOST_BYTES = 60_000
TUTORIAL = """# Title

```python
from pathlib import Path
from PIL import Image

Image.new("RGB", (900, 300), "red").save("made.png")
print("one  ")
print(number := 2)
print(Path("made.png").resolve())
```

<!-- picture: made.png: What it shows. -->

```python
print(*range(number * 20), sep="\\n")
```

```text
print("never run")
```

```yaml title="file.yaml"
a: 1
```
"""


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(DOCS / "run_tutorials.py")))


def test_outputs_and_pictures_follow_their_blocks_and_rendering_again_changes_nothing(
    script: SimpleNamespace, tmp_path: Path
) -> None:
    def render(text: str) -> str:
        return script.render(text, name="x", folder=tmp_path, pictures=tmp_path / "pictures")

    text = render(TUTORIAL)
    first, second = re.findall(r"<!-- output -->\n(.*?)<!-- end of output -->", text, re.DOTALL)
    assert first.startswith("```text\none\n2\nmade.png\n```\n\n![What it shows.](")
    assert second.splitlines()[-2:] == ["...", "```"]
    assert (tmp_path / "file.yaml").read_text() == "a: 1\n"
    with Image.open(tmp_path / "pictures" / "x-1.png") as picture:
        assert picture.size == (640, 213)
    assert render(text) == text
    assert script.BLOCK.sub(lambda block: block.group(0).partition("\n<!-- output -->\n")[0], text) == TUTORIAL


def test_a_command_that_fails_stops_the_rendering(script: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="info nothing"):
        script.render("```bash\nqadtr-brevitas info nothing\n```\n", name="x", folder=tmp_path, pictures=tmp_path)


def test_a_notebook_has_the_cells_outputs_and_pictures_of_its_page(script: SimpleNamespace, tmp_path: Path) -> None:
    page = tmp_path / "tutorials" / "x.md"
    page.parent.mkdir()
    rendered = script.render(TUTORIAL, name="x", folder=tmp_path, pictures=page.parent)
    text = (
        re.sub(r"\]\(\S*x-1.png\)", "](x-1.png)", rendered)
        + "\n```bash\nqadtr-brevitas info x\n```\n\n[Other](other.md)\n"
    )
    page.write_text(f"![Seen before.](x-1.png)\n\n{text}", encoding="utf-8")
    make = runpy.run_path(str(DOCS / "notebooks.py"))["notebook"]
    cells = json.loads(make(page, site="https://x/y"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sources[0].startswith("from pathlib import Path")
    assert sources[2:] == ["%%writefile file.yaml\na: 1", "!qadtr-brevitas info x"]
    words = cells[0]
    assert words["source"].startswith("![Seen before.](attachment:x-1.png)")
    assert b64decode(words["attachments"]["x-1.png"]["image/png"]).startswith(b"\x89PNG")
    first = cells[1]["outputs"]
    assert first[0]["text"] == "one\n2\nmade.png\n"
    assert b64decode(first[1]["data"]["image/png"]).startswith(b"\x89PNG")
    assert cells[-1]["source"] == "[Other](https://x/y/other.md)"
    assert 'print("never run")' in "".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_pictures_are_there_and_small(tutorial: Path) -> None:
    text = tutorial.read_text(encoding="utf-8")
    pictures = [tutorial.parent / name for name in re.findall(r"!\[.+?\]\((.+?\.png)\)", text)]
    assert sum(picture.stat().st_size for picture in pictures) <= MOST_BYTES
    outputs = re.findall(r"<!-- output -->\n(.*?)<!-- end of output -->", text, re.DOTALL)
    assert "".join(outputs).count("![") == text.count("<!-- picture: ")
