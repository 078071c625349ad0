"""Freed memory is kept for the next tensor.

glibc gives large blocks back to the system as soon as they are free, so that each activation is fetched anew, page by
page and filled with zeros: a twentieth to a tenth of the time of scoring a ResNet-20 on a CPU (docs/results.md).
"""

from __future__ import annotations

import os

# From malloc.h; the third is 1 GiB: larger blocks are too few to be worth keeping.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _KEPT = -1, -3, 1 << 30
_CHOSEN_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Lets this process keep up to 1 GiB of freed memory, which costs nothing where it is used again.

    The command line calls it; programs that use the package may. Nothing changes where an environment variable of glibc
    says otherwise, or where there is no glibc.

    Returns:
        Whether memory is kept now.
    """
    if any(name in os.environ for name in _CHOSEN_BY_USER):
        return False
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return mallopt(_M_TRIM_THRESHOLD, _KEPT) == 1 and mallopt(_M_MMAP_THRESHOLD, _KEPT) == 1
