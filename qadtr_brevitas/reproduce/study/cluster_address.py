"""Connecting to a Ray cluster, with an answer within seconds where there is none."""

from __future__ import annotations

import logging
import os
import re
import socket
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.extras import require

AUTO = "auto"
_SECONDS = 5.0
# What `ray start --head` listens on: for nodes of the cluster, and for programs on other machines.
_PORT, _CLIENT_PORT = 6379, 10001
# Of HTTP/2: the type of a frame, and the bytes of the head of any.
_SETTINGS, _FRAME_HEAD = 4, 9
_ADDRESS = re.compile(r"(ray://)?([\w.-]+|\[[0-9a-fA-F:]+\])(?::(\d{1,5}))?", re.ASCII)


@contextmanager
def connected(address: str) -> Generator[Any]:
    """Connect this process to a cluster during a block, which receives the module `ray`.

    A connection that is there already is used, and stays.

    Args:
        address: `HOST:PORT` of a cluster that this machine belongs to, `ray://HOST:PORT` of another, or `auto` for the
            one that Ray's variable RAY_ADDRESS or the last `ray start` of this machine names.

    Raises:
        UsageError: Ray is not installed, the address cannot be read, or no cluster answers there.
    """
    # Ray tries so often, for 40 seconds each, and reads this when it is imported.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")
    ray: Any = require("ray", extra="ray", purpose="study --ray")
    if ray.is_initialized():
        yield ray
        return
    known = _known_address() if address == AUTO else address
    # Ray itself tries for minutes.
    _check_port(known)
    try:
        ray.init(address=known, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, TimeoutError, ValueError, RuntimeError, SystemExit) as error:
        raise _no_cluster(known, str(error).strip().partition("\n")[0]) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _known_address() -> str:
    """Return the address that Ray would use; `auto` where it has to look at the processes of this machine."""
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    try:
        return (folder / "ray" / "ray_current_cluster").read_text(encoding="utf-8").strip() or AUTO
    except OSError:
        return AUTO


def _check_port(address: str) -> None:
    if address == AUTO:
        return
    host, port = _host_and_port(address)
    try:
        with socket.create_connection((host, port), timeout=_SECONDS) as connection:
            is_cluster = os.environ.get("RAY_USE_TLS") == "1" or _speaks_grpc(connection)
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, f"{host} does not answer on port {port}: {error}") from error
    if not is_cluster:
        raise _no_cluster(address, f"something else listens on port {port} of {host}")


def _speaks_grpc(connection: socket.socket) -> bool:
    """Return whether the other side answers as a server of HTTP/2, with a SETTINGS frame (RFC 9113, section 3.4)."""
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0)))
    head = connection.recv(_FRAME_HEAD)
    return len(head) == _FRAME_HEAD and head[3] == _SETTINGS


def _host_and_port(address: str) -> tuple[str, int]:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UsageError(
            f"--ray {address!r} is no address: give HOST:PORT or ray://HOST:PORT, for instance head:{_PORT}; before "
            "KEY=VALUE give --ray auto"
        )
    client, host, port = match.groups()
    return host.strip("[]"), int(port or (_CLIENT_PORT if client else _PORT))


def _no_cluster(address: str, reason: str) -> UsageError:
    return UsageError(
        f"there is no Ray cluster at {address!r} ({reason}): start one with `ray start --head`, and with `ray start "
        "--address HOST:PORT` on other nodes; give --ray ray://HOST:PORT on a machine that is no node of it; or use "
        "the cores of this machine with --jobs N"
    )
