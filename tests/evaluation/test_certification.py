from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.patch_size import PatchSize
from qadtr_brevitas.evaluation import CellStore, certification, compute, evaluate
from qadtr_brevitas.evaluation.certification import Certification, CertifyJob
from qadtr_brevitas.evaluation.defended import defended
from qadtr_brevitas.evaluation.masks import covering_masks
from qadtr_brevitas.evaluation.report import CertifiedCell, read_report
from qadtr_brevitas.evaluation.report.csv_tables import certified_csv
from qadtr_brevitas.evaluation.report.files import write_report
from qadtr_brevitas.evaluation.report.summaries import tables, terminal_tables
from tests.evaluation.fakes import Reader, coded_split, make_grid, reader, white_patch

# Two masks together leave most of an image to be seen, so that its median stays.
TWO = Certification(size=2, masks=6)


def test_a_model_that_reads_the_median_is_proved_and_one_that_is_fooled_is_not(tmp_path: Path) -> None:
    # White patches cannot move the median of the image, but a fooled reader looks for white, and masks are black.
    report = evaluate(make_grid([reader()], certifications=[TWO]), output=tmp_path)
    for cell in report.certified:
        assert (cell.size, cell.masks, cell.method) == (2, 16, "double masking")
        assert (cell.clean_accuracy.value, cell.certified_accuracy.value) == (1.0, 1.0)

    class Doubter(Reader):
        """Sees another class wherever the middle of the image is black and the rest is not."""

        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            odd = (images[:, :, 4, 4].sum(dim=1) == 0) & (images.flatten(1).amax(dim=1) > 0)
            logits[odd] = logits[odd].roll(1, dims=1)
            return logits

    doubted = evaluate(make_grid([reader("doubter", Doubter())], certifications=[TWO]), output=tmp_path)
    # Of four classes the first is black all over, where a black mask changes nothing.
    assert [cell.certified_accuracy.count for cell in doubted.certified] == [10, 10]
    # Masks on the middle contradict the others, and no second mask contradicts them.
    assert [cell.clean_accuracy.count for cell in doubted.certified] == [10, 10]


def test_a_patch_cannot_change_a_certified_prediction_of_the_report(tmp_path: Path) -> None:
    report = evaluate(make_grid([reader()], [white_patch(precision=4)], certifications=[TWO]), output=tmp_path)
    assert all(cell.certified_accuracy.value == 1 for cell in report.certified)
    # The undefended prediction is lost all the same: what is proved is the prediction under masks.
    assert any(cell.asr.value == 1 for cell in report.cells)


def test_finished_cells_are_kept_and_others_are_not_taken_for_them(tmp_path: Path) -> None:
    model = Reader()
    grid = make_grid([reader(model=model)], certifications=[TWO], batch_size=16)
    store = CellStore.open(tmp_path)
    jobs = grid.jobs()
    # Both clean cells, and portions of 32 of the 40 images and of the rest at both precisions.
    assert len(jobs) == 2 + 2 * 2
    compute(jobs[:3], store)
    first = evaluate(grid, output=tmp_path)
    before = model.forwards
    assert evaluate(grid, output=tmp_path).certified == first.certified
    assert model.forwards == before
    evaluate(make_grid([reader(model=model)], certifications=[Certification(3, 3)], batch_size=16), output=tmp_path)
    assert model.forwards > before


def test_tables_and_files_show_what_is_proved(tmp_path: Path) -> None:
    report = evaluate(make_grid([reader()], certifications=[TWO, Certification(3, 2)]), output=tmp_path)
    written = write_report(report, tmp_path)
    assert [path.name for path in written] == [
        "report.json",
        "report.md",
        "cells.csv",
        "worst_case.csv",
        "certified.csv",
    ]
    assert read_report(tmp_path) == report
    # Programs read these keys: a change needs a new schema version.
    keys = {"model", "precision", "method", "fill", "tta", "overlap", "size", "masks", "passes"}
    figures = {"clean_accuracy", "certified_accuracy"}
    prints = {"weights_fingerprint", "masks_fingerprint", "data_fingerprint"}
    assert set(json.loads((tmp_path / "report.json").read_text())["certified"][0]) == {*keys, *figures, *prints}
    (table,) = [table for table in terminal_tables(report) if table.title == "Certified accuracy against one patch"]
    labels = [row[1] for row in table.rows if row]
    assert labels == [
        "clean accuracy",
        *(
            f"{name}: {what}"
            for name in ("2x2, 16 masks", "3x3, 4 masks")
            for what in (
                "defended",
                "defended, 95 % interval",
                "certified",
                "certified, 95 % interval",
                "passes per image",
            )
        ),
    ]
    assert "certified" in (tmp_path / "report.md").read_text()
    lines = certified_csv(report).splitlines()
    assert lines[0].startswith("model,precision,method,fill,tta,overlap,size,masks,clean_accuracy_count")
    assert len(lines) == 1 + 2 * 2


def test_rectangles_and_one_round_stand_beside_squares(tmp_path: Path) -> None:
    filled = Certification(TWO.size, TWO.masks, fill="interpolate")
    flipped = Certification(TWO.size, TWO.masks, tta="flip")
    denser = Certification(TWO.size, 3, overlap=2)
    wanted = [TWO, Certification("1x4", 6), Certification(2, method="one round"), filled, flipped, denser]
    report = evaluate(make_grid([reader()], certifications=wanted, precisions=[4]), output=tmp_path)
    square, bar, single, interpolated, mirrored, overlapping = report.certified
    assert [(cell.size, cell.method, cell.fill, cell.tta, cell.overlap) for cell in report.certified] == [
        (2, "double masking", "mean", "none", 1),
        ("1x4", "double masking", "mean", "none", 1),
        (2, "one round", "mean", "none", 1),
        (2, "double masking", "interpolate", "none", 1),
        (2, "double masking", "mean", "flip", 1),
        (2, "double masking", "mean", "none", 2),
    ]
    assert overlapping.certified_accuracy.value == 1
    assert overlapping.passes == denser.passes_to_prove((8, 8)) > overlapping.masks
    assert overlapping.label == f"2x2, {overlapping.masks} masks, overlap 2"
    # The median stays under each pair of masks, but not under lines of windows that cover half of an image.
    assert square.certified_accuracy.value == bar.certified_accuracy.value == 1
    assert single.passes == single.masks
    # All pairs once: 16 masks, 120 pairs.
    assert square.passes == interpolated.passes == 16 + 120
    assert mirrored.passes == 2 * (16 + 120)
    assert len({cell.masks_fingerprint for cell in report.certified}) == len(wanted)
    assert {cell.weights_fingerprint for cell in report.certified} == {"reader-weights"}
    assert {cell.data_fingerprint for cell in report.certified} == {report.data.fingerprint}
    assert "1x4, 20 masks: certified" in str([table.rows for table in tables(report)])
    assert {"one round", "interpolate", "flip"} <= set(certified_csv(report).replace("\n", ",").split(","))


def test_success_rates_and_certificates_stand_in_one_table(tmp_path: Path) -> None:
    report = evaluate(make_grid([reader()], [white_patch(precision=4)], certifications=[TWO]), output=tmp_path)
    (table,) = [table for table in terminal_tables(report) if "ASR at each precision" in table.title]
    assert {"2x2, 16 masks: defended", "2x2, 16 masks: certified"} <= {row[1] for row in table.rows if row}


def test_a_certificate_is_never_taken_for_other_weights_precisions_masks_or_images(tmp_path: Path) -> None:
    base = {"certifications": [TWO], "precisions": [8]}
    evaluate(make_grid([reader()], **base), output=tmp_path)

    def forwards(**changes: Any) -> int:
        model = Reader()
        loaded = reader(model=model, fingerprint=changes.pop("fingerprint", None))
        evaluate(make_grid([loaded], **{**base, **changes}), output=tmp_path / "other", cells=[tmp_path])
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        return model.forwards

    assert forwards() == 0
    assert forwards(fingerprint="others") > 0
    assert forwards(precisions=[4]) > 0
    others = [
        Certification(3, 6),
        Certification("2x1", 6),
        Certification(2, 5, "one round"),
        Certification(TWO.size, TWO.masks, tta="flip"),
        Certification(TWO.size, TWO.masks, overlap=2),
    ]
    for other in (Certification(2, 3), Certification(TWO.size, TWO.masks, fill="interpolate"), *others):
        assert forwards(certifications=[other]) > 0
    # Strides are of whole pixels: five and six masks along a side of these small images are the same.
    assert forwards(certifications=[Certification(2, 5)]) == 0
    assert forwards(split=coded_split(39)) > 0


def test_outcomes_under_masks_of_another_construction_are_not_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated() -> tuple[int, list[str]]:
        model = Reader()
        loaded = reader(model=model)
        behind = defended(loaded, TWO)
        report = evaluate(make_grid([loaded, behind], certifications=[TWO], precisions=[8]), output=tmp_path)
        return model.forwards, [behind.fingerprint, *(cell.masks_fingerprint for cell in report.certified)]

    _, before = evaluated()
    assert evaluated() == (0, before)

    def wider(image_size: tuple[int, int], patch: PatchSize, *, per_side: int) -> Tensor:
        # As many masks, each of which covers more, so that nothing but their pixels tells them apart.
        masks = covering_masks(image_size, patch, per_side=per_side)
        return masks | masks.roll(1, dims=2)

    monkeypatch.setattr(certification, "covering_masks", wider)
    forwards, after = evaluated()
    assert forwards > 0
    assert not set(before) & set(after)
    assert evaluated() == (0, after)


def test_a_budget_takes_the_first_images_of_one_order_and_more_of_them_later_take_up_there(tmp_path: Path) -> None:
    model = Reader()

    def certified(count: int) -> CertifiedCell:
        grid = make_grid([reader(model=model)], certifications=[TWO], certify_images=count, precisions=[8])
        assert sum(isinstance(job, CertifyJob) for job in grid.jobs()) == -(-count // 32)
        return evaluate(grid, output=tmp_path).certified[0]

    # Each image is compared with its own label: the reader is right on all of them.
    assert (certified(32).certified_accuracy.count, certified(32).certified_accuracy.n) == (32, 32)
    before = model.forwards
    assert (certified(40).certified_accuracy.count, certified(40).certified_accuracy.n) == (40, 40)
    more = model.forwards - before
    assert 0 < more < before
    grid = make_grid([reader()], certifications=[TWO], certify_images=8)
    assert grid.split.labels[grid.certified_order[:8]].bincount().tolist() == [2, 2, 2, 2]
    for count in (0, 41):
        with pytest.raises(UsageError, match=f"{count} images .* 40"):
            make_grid([reader()], certifications=[TWO], certify_images=count)


class Counter(Reader):
    """Counts the images that it is shown, and stops the evaluation, as a user does, once there were so many."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        super().__init__()
        self.images, self.stop_after = 0, stop_after

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        if self.stop_after is not None and self.images > self.stop_after:
            raise KeyboardInterrupt
        return super().forward(images)


def shown(output: Path, *, stop_after: int | None = None, **settings: Any) -> int:
    """Return how many images the model is shown, masked and clean, by an evaluation on 100 images."""
    model = Counter(stop_after=stop_after)
    given: dict[str, Any] = {"certifications": [TWO], "precisions": [8], **settings}
    grid = make_grid([reader(model=model)], split=coded_split(100), **given)
    try:
        evaluate(grid, output=output)
    except KeyboardInterrupt:
        assert stop_after is not None
    return model.images


def test_a_stopped_certification_goes_on_without_computing_anything_twice(tmp_path: Path) -> None:
    # Clean images once, and each image under all 16 masks and 120 pairs.
    whole = 100 + 100 * (16 + 120)
    assert shown(tmp_path / "whole") == whole
    # Stopped in the second of four portions, of which no more than the one that was begun is lost.
    shown(tmp_path / "stopped", stop_after=100 + 40 * (16 + 120))
    assert shown(tmp_path / "stopped") == whole - (100 + 32 * (16 + 120))
    reports = [
        evaluate(make_grid([reader()], split=coded_split(100), certifications=[TWO], precisions=[8]), output=o)
        for o in (tmp_path / "whole", tmp_path / "stopped")
    ]
    assert reports[0].certified == reports[1].certified


def test_all_images_take_up_where_some_of_them_end(tmp_path: Path) -> None:
    assert shown(tmp_path, certify_images=64) == 100 + 64 * (16 + 120)
    # Whatever the seed, as nothing of a certificate is random.
    assert shown(tmp_path, seed=1) == 36 * (16 + 120)
    assert shown(tmp_path, certify_images=100) == 0


def test_wrong_sizes_methods_and_repeats_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'5y'.*3x10"):
        Certification("5y")
    with pytest.raises(UsageError, match=r"'two rounds'.*one round"):
        Certification(5, method="two rounds")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"'blur'.*interpolate"):
        Certification(5, fill="blur")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="overlap of 0 masks"):
        Certification(5, overlap=0)
    with pytest.raises(UsageError, match="overlap already"):
        Certification(5, method="one round", overlap=2)
    with pytest.raises(UsageError, match="2x2, double masking"):
        make_grid([reader()], certifications=[TWO, TWO])
    with pytest.raises(UsageError, match=r"prime number .* got 6"):
        make_grid([reader()], certifications=[Certification(2, 6, "one round")])


def test_reports_without_certifications_have_neither_table_nor_file(tmp_path: Path) -> None:
    report = evaluate(make_grid([reader()]), output=tmp_path)
    assert "certified.csv" not in [path.name for path in write_report(report, tmp_path)]
    assert not [table for table in tables(report) if "Certified" in table.title]


def test_random_precisions_and_patches_off_the_image_are_refused() -> None:
    with pytest.raises(UsageError, match=r"reader at random\(8\+4\) answers differently each time"):
        make_grid([reader()], certifications=[TWO], precisions=["random(8+4)"])
    with pytest.raises(UsageError, match="a patch of 9x9 pixels does not fit on images of 8x8"):
        make_grid([reader()], certifications=[Certification(9, 3)])
