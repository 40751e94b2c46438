"""The C library's heap, for programs that ask for the same large blocks again and again, as a training does in every step."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""glibc's numbers of what `mallopt` sets."""
LARGEST = 1 << 30
"""Bytes of a block that is still kept, and half of what may lie free at the heap's end."""
LARGEST_BEFORE = (4 << 20) * ctypes.sizeof(ctypes.c_long)
"""The same where glibc is older than 2.35, which takes no more."""
PAD = 128 << 20
"""Bytes that a heap is kept larger than needed, address space until they are used: what keeps the heaps of other threads, of 64 MiB each."""
USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")

LOCAL = {"MALLOC_ARENA_MAX": "1"}
"""Environment of a process that keeps all it can: one heap for all threads. Ray trains in a thread, where blocks of over 64 MiB are not kept otherwise."""


def keep_freed() -> bool:
    """Lets this process keep the memory that it frees, for the next time that it asks for some; whether it does now.

    Otherwise glibc may hand the same blocks back to the system and get them again in every step, each page as a fault and filled with zeros. Whether
    it does depends on what lay where in memory before, and a step takes up to half as long again (`benchmarks/README.md`). Nothing is changed
    with another C library, or where the user has set glibc's own variables.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in USERS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    does_keep = bool(mallopt(_MMAP_THRESHOLD, LARGEST) or mallopt(_MMAP_THRESHOLD, LARGEST_BEFORE))
    return bool(mallopt(_TRIM_THRESHOLD, 2 * LARGEST - 1)) and bool(mallopt(_TOP_PAD, PAD)) and does_keep
