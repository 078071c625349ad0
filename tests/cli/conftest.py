from pathlib import Path

import pytest

from tests.cli.evaluation import make_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two model directories with patches."""
    return make_runs(tmp_path_factory.mktemp("runs"))
