"""What the process that decodes may use: a video file can be made to eat a machine."""

from __future__ import annotations

import resource
from pathlib import Path

# Libraries that are loaded later are mapped without being data.
_MAPPED_MB = 1024
_OPEN_FILES = 64


def apply_limits(memory_mb: int) -> None:
    """Limits this process for good: memory, open files, no file written, no core dump.

    Args:
        memory_mb: Megabytes of data beyond what the process holds now.

    Raises:
        ValueError: `memory_mb` is below 1.
    """
    if memory_mb < 1:
        raise ValueError(f"memory_mb must be at least 1, got {memory_mb}")
    _limit(resource.RLIMIT_DATA, _used("VmData") + (memory_mb << 20))
    _limit(resource.RLIMIT_AS, _used("VmSize") + ((memory_mb + _MAPPED_MB) << 20))
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    # Pictures of a home must not end up on the disk by a crash, nor by a hole in a decoder.
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)


def _used(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))
