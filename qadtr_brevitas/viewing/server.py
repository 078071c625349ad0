"""The page over HTTP, to this machine's own browser only.

Three things keep others out: the server listens on the loopback address; it answers only requests whose Host is this
machine, so that no web page reaches it under another name (DNS rebinding); and every request carries a token that only
the printed address has. A request that a page of another origin makes is refused by its Origin.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from qadtr_brevitas.core.errors import QadtrError, UsageError
from qadtr_brevitas.viewing.scene import Look, Scene

_HOSTS = ("127.0.0.1", "localhost")
_MOST_BYTES = 65536
_JSON, _HTML, _TEXT = "application/json", "text/html; charset=utf-8", "text/plain; charset=utf-8"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; connect-src 'self'"


class ViewServer(ThreadingHTTPServer):
    """Serves scenes on the loopback address; `serve_forever` runs until it is interrupted.

    Args:
        scenes: what is looked at, one for each model.
        port: 0 for one that is free.

    Attributes:
        scenes: the same.
        token: what every request has to carry.

    Raises:
        UsageError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, scenes: Sequence[Scene], *, port: int = 0) -> None:
        self.scenes, self.token = tuple(scenes), secrets.token_urlsafe(16)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise UsageError(f"cannot listen on port {port} ({error.strerror}): give another as --port") from error

    @property
    def address(self) -> str:
        """The address of the page, with the token."""
        return f"http://127.0.0.1:{self.server_address[1]}/?token={self.token}"

    def __exit__(self, *error: Any) -> None:
        """Wait for what is looked at, and stop listening."""
        for scene in self.scenes:
            scene.end()
        super().__exit__(*error)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep silent about a browser that no longer waits for its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def facts(self, model: str) -> dict[str, Any]:
        """Return what the page needs to know first about the model of an index.

        Raises:
            UsageError: there is no such model.
        """
        if not model.isdecimal():
            raise UsageError(f"model is {model!r}: give 0 to {len(self.scenes) - 1}")
        names = [scene.loaded.name for scene in self.scenes]
        return {"models": names, **self._scene(int(model)).facts()}

    def look(self, asked: Look) -> dict[str, Any]:
        """Return what the model that is asked for sees, as `Scene.look` does.

        Raises:
            UsageError: there is no such model, or as `Scene.look`.
        """
        return self._scene(asked.model).look(asked)

    def _scene(self, model: int) -> Scene:
        if not 0 <= model < len(self.scenes):
            raise UsageError(f"there is no model {model}: give 0 to {len(self.scenes) - 1}")
        return self.scenes[model]


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server_version = "qadtr-brevitas"
    sys_version = ""

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(place.query).items()}
        if self._is_refused(asked.get("token", "")):
            return
        if place.path == "/":
            nonce = secrets.token_urlsafe(16)
            self._answer(HTTPStatus.OK, page(nonce), _HTML, policy=_POLICY.format(nonce=nonce))
        elif place.path == "/facts":
            self._answer_json(lambda: self._view.facts(asked.get("model", "0")))
        else:
            self._answer(HTTPStatus.NOT_FOUND, "there is no such page", _TEXT)

    def do_POST(self) -> None:
        if self._is_refused(self.headers.get("X-Token", "")):
            return
        if urlsplit(self.path).path != "/look":
            self._answer(HTTPStatus.NOT_FOUND, "there is no such page", _TEXT)
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MOST_BYTES:
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"give at most {_MOST_BYTES} bytes", _TEXT)
            return
        body = self.rfile.read(int(length))
        self._answer_json(lambda: self._view.look(Look.parse(_read_object(body))))

    def log_message(self, format: str, *args: object) -> None:
        """Keep silent: the terminal is for the command."""

    @property
    def _view(self) -> ViewServer:
        return cast("ViewServer", self.server)

    def _is_refused(self, token: str) -> bool:
        """Return whether a request is not of the page that was opened, and say so to who sent it."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        if host.rpartition(":")[0] not in _HOSTS or origin not in (None, f"http://{host}"):
            self._answer(HTTPStatus.FORBIDDEN, "this page is for the browser of this machine only", _TEXT)
        elif not secrets.compare_digest(token.encode(), self._view.token.encode()):
            self._answer(HTTPStatus.FORBIDDEN, "open the whole address that the command printed, token included", _TEXT)
        else:
            return False
        return True

    def _answer_json(self, make: Callable[[], dict[str, Any]]) -> None:
        try:
            status, found = HTTPStatus.OK, make()
        except QadtrError as error:
            status, found = HTTPStatus.BAD_REQUEST, {"error": str(error)}
        self._answer(status, json.dumps(found, allow_nan=False), _JSON)

    def _answer(self, status: HTTPStatus, text: str, kind: str, *, policy: str = "default-src 'none'") -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def page(nonce: str) -> str:
    """Return the page, whose script carries a nonce."""
    text = files("qadtr_brevitas.viewing").joinpath("page.html").read_text(encoding="utf-8")
    return text.replace("NONCE", nonce)


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError as error:
        raise UsageError(f"this is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError("give a JSON object")
    return cast("dict[str, Any]", found)
