"""What a process that computes does with memory it has freed: it keeps it for the next batch."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 * 2**20
#: The most that glibc allows; a larger block has pages of its own, which go back at once.
_BLOCK_BYTES = 32 * 2**20


def keep_freed_memory() -> None:
    """Let glibc keep what a batch has freed, which the next one takes again; other C libraries are left alone.

    It would give the end of the heap back after each batch, or not, as whatever lies there happens to be in use: then a
    batch begins with thousands of page faults, and a small model on a CPU takes a fifth longer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Either one alone would end the adaption of the other, which begins at 128 KiB.
        mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
