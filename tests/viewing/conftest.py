"""The server of `view` stopped at once."""

from __future__ import annotations

import pytest

from qadtr_brevitas.viewing import Scene, ViewServer


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Scene]:
    """The scenes of servers that were started, each of which ends at once as if by Ctrl-C."""
    scenes: list[Scene] = []

    def serve(self: ViewServer) -> None:
        scenes.extend(self.scenes)
        raise KeyboardInterrupt

    monkeypatch.setattr(ViewServer, "serve_forever", serve)
    return scenes
