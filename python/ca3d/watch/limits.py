"""What the process that decodes may use: a video file can be made to eat a machine."""

from __future__ import annotations

import resource

# Libraries and their thread stacks are mapped without being used.
_MAPPED_MB = 2048
_OPEN_FILES = 64


def apply_limits(memory_mb: int) -> None:
    """Limits this process for good: memory, open files, no file written, no core dump.

    Args:
        memory_mb: Megabytes of data; as much again and 2 GB may be mapped.

    Raises:
        ValueError: `memory_mb` is below 1.
    """
    if memory_mb < 1:
        raise ValueError(f"memory_mb must be at least 1, got {memory_mb}")
    _limit(resource.RLIMIT_DATA, memory_mb << 20)
    _limit(resource.RLIMIT_AS, (2 * memory_mb + _MAPPED_MB) << 20)
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    # Pictures of a home must not end up on the disk by a crash, nor by a hole in a decoder.
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))
