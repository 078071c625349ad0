"""study.json: which evaluations and analyses belong together, and which rows of the paper they answer."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from qadtr_brevitas.errors import CheckpointError
from qadtr_brevitas.paper import paper_table

STUDY_FILE = "study.json"


class _Part(BaseModel):
    # A study holds more than a page shows.
    model_config = ConfigDict(frozen=True, extra="ignore")


class StudyRow(_Part):
    """What a model stands for.

    `paper` is its name in the paper's table, null where it has none there; `seed` the seed it was trained with;
    `precision` the one to compare where the paper's table names none.
    """

    label: str
    paper: str | None = None
    seed: int | None = None
    precision: str | None = None


class StudyFacts(_Part):
    """What a page reads of study.json.

    `paper` names a table or figure; `reports` and `analyses` are folders, relative to that of the study; `unseen` those
    of the reports whose patches are unlike those of training; `rows` says of each model, by its name in the reports,
    what it stands for.
    """

    title: str
    paper: str | None = None
    scale: str
    command: str
    versions: dict[str, str]
    reports: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
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
