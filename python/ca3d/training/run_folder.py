"""The folder of a run: options, lists, versions, and a lock against a second writer."""

from __future__ import annotations

import fcntl
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from ca3d.errors import UserError
from ca3d.training.checkpoint import remove_leftovers, write_file
from ca3d.training.distributed import World
from ca3d.training.logs import write_json

# Options that may differ between a run and its resumption: none of them changes the result.
FREE_OPTIONS = frozenset(
    {
        *("out", "data", "resume", "checkpoint_steps", "max_skipped", "early_stopping"),
        "split_files",
        *("workers", "decoder", "device", "log_steps", "tensorboard", "progress"),
    }
)


class RunFolder:
    """Holds the folder of a run while the run is going.

    Args:
        path: The folder; made when missing.
        resume: Whether a run found there may be continued.
        writes: Whether this process writes to it; another one of the same run may read.

    Raises:
        ca3d.errors.UserError: The folder can't be made, holds a run that may not be continued, or
            is in use by another process.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, RunFolder(f"{folder}/run") as run:
        ...     run.has_resume_state
        False
    """

    def __init__(self, path: str | Path, resume: bool = False, writes: bool = True) -> None:
        self.path = Path(path)
        self._lock = None
        if not writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot use {path} for the run: {error.strerror}") from error
        try:
            # A POSIX lock: unlike flock's, it does not live on in worker processes.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise UserError(f"{path} is in use by another training process") from error
        if self.has_run and not resume:
            self.close()
            raise UserError(
                f"{path} already holds a run;"
                " continue it with --resume auto or choose another --out"
            )
        if not self.has_resume_state and (self.path / "test" / "results.json").is_file():
            self.close()
            raise UserError(
                f"{path} holds test results, but not the {self.resume_file.name} of the run that"
                " they are of; choose another --out"
            )
        remove_leftovers(self.path)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the folder free."""
        if self._lock is not None:
            self._lock.close()

    @property
    def resume_file(self) -> Path:
        """Where the resume state lies."""
        return self.path / "resume.pt"

    @property
    def has_resume_state(self) -> bool:
        """Whether there is a state to continue from."""
        return self.resume_file.is_file()

    @property
    def has_run(self) -> bool:
        """Whether a run got as far as its first checkpoint here."""
        return self.has_resume_state or (self.path / "last.safetensors").is_file()

    def write_config(self, options: dict[str, Any]) -> None:
        """Writes `config.yaml`, which `ca3d train --config` reads, and `environment.json`."""
        text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
        write_file(self.path / "config.yaml", text)
        write_json(self.path / "environment.json", environment())

    def check_same(
        self, saved: dict[str, Any], now: dict[str, Any], processes: int, world: World
    ) -> None:
        """Raises `UserError` when what changes the result differs from the saved run's."""
        if processes != world.size:
            raise UserError(
                f"{self.path} was trained by {processes} processes and can't be resumed by"
                f" {world.size}"
            )
        differ = [
            f"--{key.replace('_', '-')} was {saved.get(key)!r}, is {now[key]!r}"
            for key in now
            if key not in FREE_OPTIONS and key in saved and saved[key] != now[key]
        ]
        if differ:
            raise UserError(f"{self.path} can't be resumed with other options: {'; '.join(differ)}")


def environment() -> dict[str, Any]:
    """Returns the versions and the machine that a result depends on.

    Example:
        >>> sorted(environment())[:3]
        ['command', 'cores', 'cpu']
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: _version(name) for name in _PACKAGES},
        "command": sys.argv,
    }


_PACKAGES = ("ca3d-kernels", "torch", "torchvision", "numpy", "av", "safetensors", "jsonargparse")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
