"""Names in a study that refer to nothing, and settings that do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reproduce.study.support import STUDY, mistakes, write_study_file


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("attacks: [lavan, pgd]", "attacks: [lavan, pdg]", "there is no 'pdg' in this study: did you mean 'pgd'"),
        ("start: plain, train", "start: plane, train", "there is no 'plane' in this study: did you mean 'plain'"),
        ("{{label: Plain}}", "{{start: fixed}}", "plain from fixed from plain"),
        (
            "{{label: Plain}}",
            "{{path: x, defense: at}}",
            "leave out defense, or path",
        ),
        ("main: {{", "main: {{models: [fixd], ", "there is no 'fixd' in this study: did you mean 'fixed'"),
        ("main: {{", "main: {{audit: {{twin: plane}}, ", "there is no 'plane' in this study: did you mean 'plain'"),
        ("main: {{", "main: {{eot: [8+x], ", "is not a precision"),
        ("[lavan, pgd]}}", "[pgd], protocol: unseen}}", "the first attack, which must make universal patches"),
        ("steps: 1}}}}", "steps: 1}}, per_image: false}}", "cannot make universal patches"),
        ("steps: 1}}}}", "steps: 1}}, made_at: [4]}}", "leave out made_at"),
        ("steps: 3}}", "steps: 3}}, made_on: [fixedd]", "there is no 'fixedd' in this study: did you mean 'fixed'"),
        ("recipe: {recipe}", "seeds: [0]", "needs a recipe"),
        ("budget:", "analyses: {{a: {{analysis: sptial, models: [plain]}}}}\nbudget:", "did you mean 'spatial'"),
    ],
)
def test_wrong_references_and_combinations_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in STUDY
    assert message in mistakes(write_study_file(tmp_path, study=STUDY.replace(old, new)))
