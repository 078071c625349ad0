"""The page in a real browser, if one is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from qadtr_brevitas.reproduce.page import build_page, read_inputs
from qadtr_brevitas.reproduce.page.render import html
from tests.reproduce.page.support import make_report, make_study

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Headless browsers do not make a window as narrow as a phone, so the page is shown in a frame.
FRAME = "<body style='margin:0'><iframe id=page src='{page}' style='border:0;width:{width}px;height:900px'></iframe>"
MEASURE = """{frame}<pre id=out></pre>
<script>onload = () => {{ const inside = document.getElementById('page').contentDocument;
const wide = [...inside.querySelectorAll('body *')].filter(e => !e.closest('.table')
  && e.getBoundingClientRect().right > {width} + 1).map(e => e.tagName);
const drawn = [...inside.images].filter(image => image.naturalWidth > 300).length;
const large = [...inside.querySelectorAll('.note p')].filter(e => parseFloat(getComputedStyle(e).fontSize) > 14).length;
const found = [inside.documentElement.scrollWidth, wide, drawn, large];
document.getElementById('out').textContent = JSON.stringify(found); }}
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = make_study(tmp_path_factory.mktemp("study"))
    make_report(study / "seen")
    file = study / "page.html"
    file.write_text(html(build_page(read_inputs([study]), title="Results")), encoding="utf-8")
    return file


def run(browser: str, *arguments: str) -> str:
    common = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files")
    done = subprocess.run([browser, *common, *arguments], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.parametrize("width", [390, 1200])
def test_only_tables_are_wider_than_the_window_and_they_scroll(browser: str, page: Path, width: int) -> None:
    frame = page.with_name(f"measure-{width}.html")
    frame.write_text(MEASURE.format(frame=FRAME.format(page=page.name, width=width), width=width))
    # Without a time budget, the page is dumped before the images of the frame are decoded.
    text = run(browser, "--virtual-time-budget=4000", "--dump-dom", f"file://{frame}")
    measured = re.search(r"<pre id=\"out\">(.*)</pre>", text)
    assert measured
    assert json.loads(measured[1]) == [width, [], page.read_text().count("<img"), 0]


def test_a_screenshot_shows_text_and_colors(browser: str, page: Path) -> None:
    frame, picture = page.with_name("frame.html"), page.with_name("page.png")
    frame.write_text(FRAME.format(page=page.name, width=1200))
    run(browser, "--window-size=1200,900", f"--screenshot={picture}", f"file://{frame}")
    with Image.open(picture) as image:
        assert image.size == (1200, 900)
        colors = image.convert("RGB").getcolors(1 << 20) or []
    assert len(colors) > 50
    assert max(colors)[1] == (255, 255, 255)


def test_the_page_can_be_printed(browser: str, page: Path) -> None:
    printed = page.with_suffix(".pdf")
    run(browser, f"--print-to-pdf={printed}", f"file://{page}")
    assert printed.read_bytes().startswith(b"%PDF")
