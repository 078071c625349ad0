"""study.json: which evaluations and analyses a study consists of, and which rows of the paper they correspond to."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ValidationError

from qadtr_brevitas.core.document import Document
from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.pipeline.directories import STUDY_FILE
from qadtr_brevitas.reproduce.paper import paper_table

_UNSEEN = "unseen"
_IN_BRACKETS = re.compile(r"\s*(\[[^]]*\]|\([^)]*\))")


class StudyRow(Document, extra="ignore"):
    """What a network in the reports of a study stands for.

    `label` is its name in tables; `paper` its row or column in the paper's table, null if it has none; `seed` its
    training seed; `model` its model in the study; `evaluation` its evaluation, in a study with several; `precision` the
    precision to compare if the paper's table names none.
    """

    label: str
    paper: str | None = None
    seed: int | None = None
    model: str = ""
    evaluation: str = ""
    precision: str | None = None

    @property
    def is_unseen(self) -> bool:
        """Whether its patches are unlike those of training."""
        return _UNSEEN in f"{self.evaluation} {self.paper}".lower()

    @property
    def subject(self) -> str:
        """Its name in the paper, without brackets: PBAT for `PBAT [30]` and `PBAT (Unseen patch)`."""
        return _IN_BRACKETS.sub("", self.paper or self.label).strip()


class StudyFacts(Document, extra="ignore"):
    """The contents of study.json.

    `paper` names a table or figure; `reports` and `analyses` are folders, relative to that of the study; `rows` says
    what each network stands for, by its name in the reports.
    """

    title: str
    paper: str | None = None
    scale: str
    command: str
    versions: dict[str, str]
    reports: tuple[str, ...] = ()
    rows: dict[str, StudyRow] = {}
    analyses: tuple[str, ...] = ()


def read_study(folder: Path) -> StudyFacts:
    """Read the study.json of a folder.

    Raises:
        CheckpointError: the file cannot be read.
        UsageError: it names a table that the paper does not have.
    """
    file = folder / STUDY_FILE
    try:
        facts = StudyFacts.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{file} is damaged: run the study again, its finished steps are kept") from error
    if facts.paper is not None:
        paper_table(facts.paper)
    return facts
