"""What glibc does with freed memory on a CPU."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of mallopt's options
NEVER, LARGEST = 2**31 - 1, 2**30  # bytes


def keep_freed_memory() -> bool:
    """Keep freed memory in the process, where the next tensor finds it. Returns whether the C library can.

    By default glibc gives large blocks back to the kernel at once and gets them again for the next step, page
    by page and each page filled with zeros: a tenth of the time of a tiny step (docs/performance.md). The
    process keeps its largest size instead.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER) and mallopt(M_MMAP_THRESHOLD, LARGEST))
