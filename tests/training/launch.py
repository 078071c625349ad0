"""Programs run by torchrun, in several processes of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def torchrun(repository: Path, count: int, *command: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a script, or a module after `-m`, in several processes with one thread each.

    Args:
        repository: the top of the source tree, from which modules are imported.
        count: number of processes.
        command: the script or module, and its arguments.
        restarts: how often torchrun starts the processes again where one fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if "lo" in dict(map(reversed, socket.if_nameindex())):
        # Gloo would connect to whatever address the name of the machine has, which may refuse.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    options = ["--max-restarts", str(restarts)]
    return subprocess.run([*launcher, *options, *command], env=environment, capture_output=True, text=True)
