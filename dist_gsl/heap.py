"""The C library's heap, for programs that ask for the same large blocks again and again, as a training does in every step."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers of what `mallopt` sets."""
LARGEST = 1 << 30
"""Bytes of a block that is still kept; the largest number that glibc takes is twice it less one."""
USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed() -> bool:
    """Lets this process keep the memory that it frees, for the next time that it asks for some; whether it does now.

    Otherwise glibc may hand the same blocks back to the system and get them again in every step, each page as a fault and filled with zeros. Whether
    it does depends on what lay where in memory before: the same training took up to 28 % longer, or not (`benchmarks/README.md`). Nothing is
    changed with another C library, or where the user has set glibc's own variables.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in USERS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, 2 * LARGEST - 1))
