"""The parity suites once more, with the Triton kernels in Triton's interpreter.

The interpreter must be chosen before triton is imported, hence processes of their own.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ca3d_kernels.triton_launch import interpreted

FOLDER = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.skipif(interpreted(), reason="this process is the child"),
]


def run_interpreted(*arguments: str) -> int:
    """Runs tests in a process with the interpreter; returns how many have passed.

    None may fail and none may be skipped.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    summary = result.stdout.strip().splitlines()[-1]
    assert "skipped" not in summary, summary
    match = re.search(r"(\d+) passed", summary)
    assert match, summary
    return int(match[1])


def test_local_attention() -> None:
    tests = str(FOLDER / "local_attention" / "test_parity.py")
    # The property test runs in float64, which these kernels refuse.
    chosen = "not any_shape and not every_pair and not bfloat16 and not wider"
    assert run_interpreted(tests, "-k", chosen) > 50


@pytest.mark.slow
@pytest.mark.exhaustive
def test_local_attention_in_every_pair_of_options() -> None:
    tests = str(FOLDER / "local_attention" / "test_parity.py")
    assert run_interpreted(tests, "-k", "every_pair or bfloat16 or wider") > 90


def test_preparam_step() -> None:
    assert run_interpreted(str(FOLDER / "preparam_step" / "interpreted.py")) > 30


def test_qkv_attention() -> None:
    assert run_interpreted(str(FOLDER / "qkv_attention" / "interpreted.py")) > 15


def test_temporal_block() -> None:
    assert run_interpreted(str(FOLDER / "temporal_block" / "interpreted.py")) > 20


def test_mistakes_are_noticed() -> None:
    assert run_interpreted(str(FOLDER / "triton_mutants.py")) > 32
