"""Keeps freed memory in the process while operations are timed.

By default glibc hands large freed blocks back to the system, and the page faults of the next result
can cost several times what the operation does; whether they do depends on what ran before. An
operation is therefore timed as it runs in the middle of a program whose memory has settled. All
candidates of a comparison run under the same setting. Models are timed without it.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # names of mallopt(3)


@contextmanager
def settled_memory() -> Iterator[None]:
    """Inside it no freed memory goes back to the system; nothing changes without glibc.

    Afterwards the thresholds are those that glibc has grown to in a process that freed large
    tensors: 32 MiB for a mapping of its own, 64 MiB of unused memory at the end of the heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, 65536)
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)
