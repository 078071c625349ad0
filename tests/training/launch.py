"""Programs run by torchrun, in several processes of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def start_torchrun(repository: Path, count: int, *command: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Start a script, or a module after `-m`, in several processes with one thread each.

    Args:
        repository: the top of the source tree, from which modules are imported.
        count: number of processes.
        command: the script or module, and its arguments.
        restarts: how often torchrun starts the processes again where one fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if "lo" in {name for _, name in socket.if_nameindex()}:
        # Gloo would connect to whatever address the name of the machine has, which may refuse.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    options = ["--max-restarts", str(restarts)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*launcher, *options, *command], env=environment, text=True, **pipes)


def torchrun(repository: Path, count: int, *command: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Run what `start_torchrun` starts to its end."""
    process = start_torchrun(repository, count, *command, restarts=restarts)
    out, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)
