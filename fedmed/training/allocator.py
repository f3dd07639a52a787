"""Keep freed memory: a training step takes and frees the same hundreds of megabytes.

The C library gives large blocks back to the operating system when they are freed, which
then has to clear every page of them when the next step takes them again: a tenth of the
time of a step of a U-Net on a CPU.
"""

from __future__ import annotations

import ctypes
import functools

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of the options in glibc's malloc.h."""
_KEPT_BYTES = (1 << 30, 1 << 25)
"""Sizes up to which blocks are kept; some versions refuse more than the second."""


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for as long as it lives.

    Numbers do not change; the process stays as large as it ever was. Called once at the
    start of a process that trains; calls after that do nothing.

    Returns:
        Whether the C library knows how (glibc does).
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    is_kept = any(set_option(_MMAP_THRESHOLD, size) == 1 for size in _KEPT_BYTES)
    return is_kept and set_option(_TRIM_THRESHOLD, _KEPT_BYTES[0]) == 1
