"""Runs tests with the Triton kernels in Triton's interpreter.

The interpreter must be chosen before triton is imported, hence processes of their own. Each op has
a test file for it, so that processes of pytest share the work.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ca3d_kernels.triton_launch import interpreted

FOLDER = Path(__file__).resolve().parents[1] / "ca3d_kernels"

needs_triton = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.skipif(interpreted(), reason="this process is the child"),
]


def run_interpreted(tests: str, *arguments: str) -> int:
    """Runs a file of tests/ca3d_kernels with the interpreter; returns how many tests have passed.

    None may fail and none may be skipped. Slow and exhaustive ones run if `arguments` say so.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FOLDER / tests]
    command += ["-m", "not slow and not exhaustive"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [*map(str, command), *arguments],
        env=environment,
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    summary = result.stdout.strip().splitlines()[-1]
    assert "skipped" not in summary, summary
    match = re.search(r"(\d+) passed", summary)
    assert match, summary
    return int(match[1])
