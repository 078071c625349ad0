from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.evaluation import NamedAttack, evaluate
from qadtr_brevitas.evaluation.certification import Certification
from qadtr_brevitas.evaluation.report import certified_plot, gallery, plots
from qadtr_brevitas.evaluation.report.gallery import draw_pictures
from qadtr_brevitas.evaluation.report.plots import ImageGrid, Tile, draw_asr, draw_sheet
from qadtr_brevitas.evaluation.variants import PatchVariants
from tests.evaluation.fakes import Reader, Whiten, coded_split, make_grid, reader, small_report, white_patch

GREEN, RED = (0, 112, 79), (192, 0, 0)


def colors(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as picture:
        return {color for _, color in picture.convert("RGB").getcolors(maxcolors=1 << 24) or []}


@pytest.mark.slow
def test_pictures_of_an_evaluation(tmp_path: Path) -> None:
    loaded_models = [reader("a/b", Reader(fooled_at=(4,)), fingerprint="reader-weights"), reader("other")]
    patches = [white_patch(str(bits), precision=bits) for bits in (8, 4)]
    report = evaluate(make_grid(loaded_models, patches), output=tmp_path)
    drawn = draw_pictures(report, loaded_models, patches, coded_split(), folder=tmp_path)
    assert [path.name for path in drawn] == ["asr.png", "patches.png", "examples-a-b.png"]
    # Captions of images the patch does not fool are green, of those it turns into its target red.
    assert {GREEN, RED} <= colors(drawn[2])


def test_no_pictures_without_patches(tmp_path: Path) -> None:
    report = evaluate(make_grid([reader()], []), output=tmp_path)
    assert draw_pictures(report, [reader()], [], coded_split(), folder=tmp_path) == []


def test_asr_picture_has_a_color_for_each_model(tmp_path: Path) -> None:
    path = draw_asr(small_report(tmp_path, models=("reader", "other")), tmp_path / "asr.png")
    assert {(0, 114, 178), (213, 94, 0)} <= colors(path)


def test_certified_accuracy_is_drawn_by_precision_and_by_patch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(certified_plot, "save_figure", lambda figure, path: figures.append(figure) or path)
    sizes = [Certification(2), Certification("2x4")]
    report = evaluate(make_grid([reader()], [], certifications=sizes), output=tmp_path)
    # The values that the picture has to show.
    rates = {(cell.precision, cell.label): cell.certified_accuracy.value for cell in report.certified}
    certified_plot.draw_certified(report, tmp_path / "certified.png")
    by_precision, by_size = figures[0].axes
    assert [label.get_text() for label in by_precision.get_xticklabels()] == ["8", "4"]
    assert [label.get_text() for label in by_size.get_xticklabels()] == ["4", "8"]
    for axes, points in ((by_precision, 2), (by_size, 2)):
        # Certified and defended for each of two sizes, or two precisions; each with its intervals.
        assert len(axes.containers) == 4
        line = axes.containers[0].lines[0]
        assert len(line.get_xdata()) == points
    first = by_precision.containers[0]
    label = first.get_label().removeprefix("reader, ").removesuffix(": certified")
    assert list(first.lines[0].get_ydata()) == [100 * rates[precision, label] for precision in ("8", "4")]
    one = evaluate(make_grid([reader()], [], certifications=sizes[:1]), output=tmp_path)
    certified_plot.draw_certified(one, tmp_path / "certified.png")
    assert len(figures[1].axes) == 1
    assert draw_pictures(one, [reader()], [], coded_split(), folder=tmp_path) == [tmp_path / "certified.png"]


def test_sheet_leaves_places_empty(tmp_path: Path) -> None:
    tile = Tile(torch.zeros(3, 4, 4), "caption")
    sheet = ImageGrid("title", ("one", "two"), (("row", (tile, None)),), note="note")
    with Image.open(draw_sheet(sheet, tmp_path / "sheet.png")) as picture:
        half = picture.convert("L").crop(
            (picture.width * 2 // 3, picture.height // 2, picture.width, picture.height - 60)
        )
        assert half.getextrema() == (255, 255)


def test_picture_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    report = small_report(tmp_path)
    (tmp_path / "asr.png").mkdir()
    with pytest.raises(CheckpointError, match="cannot write"):
        draw_asr(report, tmp_path / "asr.png")


def test_attacks_on_each_image_have_curves_too(tmp_path: Path) -> None:
    grid = make_grid([reader()], attacks=[NamedAttack("whiten", Whiten())])
    report = evaluate(grid, output=tmp_path)
    drawn = draw_pictures(report, [reader()], [], coded_split(), folder=tmp_path)
    assert [path.name for path in drawn] == ["asr.png"]


def test_many_kinds_of_attacks_are_drawn_in_rows(tmp_path: Path) -> None:
    attacks = [NamedAttack("whiten", Whiten(side=side)) for side in range(1, 5)]
    report = evaluate(make_grid([reader()], attacks=attacks), output=tmp_path)
    with Image.open(draw_asr(report, tmp_path / "asr.png")) as picture:
        assert picture.width < 3 * picture.height


def test_patches_made_on_a_mean_have_a_column(tmp_path: Path) -> None:
    patches = [white_patch("8", precision=8), white_patch("mean", side=3)]
    patches[1] = replace(patches[1], patch=patches[1].patch.with_meta(precision="8+4"))
    variants = PatchVariants(at=(1, 1)).variants(patches, (8, 8))
    report = evaluate(make_grid([reader()], [*patches, *variants]), output=tmp_path)
    drawn = draw_pictures(report, [reader()], patches, coded_split(), folder=tmp_path)
    assert [path.name for path in drawn] == ["asr.png", "patches.png", "examples-reader.png"]


def test_patches_of_one_precision_have_a_column_for_each_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = [white_patch("zero", precision=8, target=0), white_patch("one", precision=8, target=1)]
    report = evaluate(make_grid([reader()], patches), output=tmp_path)
    sheets: list[ImageGrid] = []
    monkeypatch.setattr(plots, "draw_sheet", lambda sheet, path: sheets.append(sheet) or path)
    draw_pictures(report, [reader()], patches, coded_split(), folder=tmp_path)
    classes = coded_split().classes
    assert sheets[0].columns == (classes[0], classes[1])
    assert len(sheets[0].rows) == 1
    assert "made at 8 bit" in sheets[0].title


def test_examples_are_classified_correctly_without_a_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = coded_split()
    # The first image of each class looks like the next class.
    split.images[:4] = split.images[:4].roll(-1, dims=0)
    patches = [white_patch()]
    report = evaluate(make_grid([reader()], patches), output=tmp_path)
    sheets: list[ImageGrid] = []
    monkeypatch.setattr(gallery, "draw_sheet", lambda sheet, path: sheets.append(sheet) or path)
    draw_pictures(report, [reader()], patches, split, folder=tmp_path)
    assert [clean and clean.verdict for _, (clean, _) in sheets[0].rows] == ["right"] * 3


@pytest.mark.parametrize("columns", [1, 3])
def test_no_text_of_a_narrow_sheet_is_clipped(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure) or path)
    row = ("a class", (Tile(torch.zeros(3, 4, 4), "caption"),) * columns)
    words = "Below each image: predicted class. Green: right; red: the target; orange: another wrong class. " * 2
    draw_sheet(ImageGrid("a model with a long name: " * 5, ("x",) * columns, (row,), note=words), tmp_path / "x.png")
    drawn[0].draw_without_rendering()
    title, note = (" ".join(text.get_text().split()) for text in (drawn[0]._suptitle, drawn[0]._supxlabel))
    assert (title, note) == (("a model with a long name: " * 5).strip(), words.strip())
    for text in drawn[0].texts:
        box = text.get_window_extent()
        assert min(box.x0, box.y0) >= 0
        assert (box.x1 <= drawn[0].bbox.x1, box.y1 <= drawn[0].bbox.y1) == (True, True)
