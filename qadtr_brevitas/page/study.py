"""study.json: which evaluations and analyses belong together, and which rows of the paper they answer."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from qadtr_brevitas.errors import CheckpointError
from qadtr_brevitas.paper import paper_table

STUDY_FILE = "study.json"

_UNSEEN = "unseen"
_BRACKETS = re.compile(r"\s*(\[[^]]*\]|\([^)]*\))")


class _Part(BaseModel):
    # A study holds more than a page shows.
    model_config = ConfigDict(frozen=True, extra="ignore")


class StudyRow(_Part):
    """What a model of the reports stands for.

    `paper` is its row or column in the paper's table, null where it has none there; `seed` the seed it was trained
    with; `evaluation` the one it is of, in a study with several; `precision` the one to compare where the paper's table
    names none.
    """

    label: str
    paper: str | None = None
    seed: int | None = None
    evaluation: str = ""
    precision: str | None = None

    @property
    def is_unseen(self) -> bool:
        """True where its patches are unlike those of training."""
        return _UNSEEN in f"{self.evaluation} {self.paper}".lower()

    @property
    def subject(self) -> str:
        """What the paper calls it, without what is said in brackets: PBAT for `PBAT [30]` and `PBAT (Unseen patch)`."""
        return _BRACKETS.sub("", self.paper or self.label).strip()


class StudyFacts(_Part):
    """What a page reads of study.json.

    `paper` names a table or figure; `reports` and `analyses` are folders, relative to that of the study; `rows` says of
    each model, by its name in the reports, what it stands for.
    """

    title: str
    paper: str | None = None
    scale: str
    command: str
    versions: dict[str, str]
    reports: tuple[str, ...] = ()
    analyses: tuple[str, ...] = ()
    rows: dict[str, StudyRow] = {}


def read_study(folder: Path) -> StudyFacts:
    """Reads the study.json of a folder.

    Raises:
        CheckpointError: it cannot be read.
        UsageError: it names a table that the paper does not have.
    """
    file = folder / STUDY_FILE
    try:
        facts = StudyFacts.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{file} is damaged: run the study again, finished parts are kept") from error
    if facts.paper is not None:
        paper_table(facts.paper)
    return facts
