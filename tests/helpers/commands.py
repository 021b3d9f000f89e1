"""Programs that tests run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """Path of a program, without which the test is skipped."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def attempt(*command: str | Path, cwd: Path | None = None, **environment: str) -> tuple[int, str]:
    """Exit status and output of a command."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Output of a command that must succeed."""
    status, output = attempt(*command, cwd=cwd, **environment)
    assert status == 0, f"{status} from {command}:\n{output}"
    return output
