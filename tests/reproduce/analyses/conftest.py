from __future__ import annotations

import pytest

from qadtr_brevitas.evaluation.entries import LoadedModel
from tests.reproduce.analyses.support import make_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedModel]:
    """One network of 32 and 4 bit, called net0."""
    return make_models(tmp_path_factory.mktemp("models"))
