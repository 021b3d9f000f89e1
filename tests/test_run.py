"""The `run` script: what it says when something is missing, before it installs anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "run"


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(RUN), *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A folder of commands without compiler and Python, for a user who is not root."""
    for command in ("sh", "dirname", "sed", "command"):
        found = shutil.which(command)
        if found:
            (tmp_path / command).symlink_to(found)
    fake_id = tmp_path / "id"
    fake_id.write_text("#!/bin/sh\necho 1000\n")
    fake_id.chmod(0o755)
    return tmp_path


def test_says_how_to_use_it() -> None:
    result = run_script()
    assert result.returncode == 0
    assert "./run demo" in result.stdout
    assert "TORCH_INDEX_URL" in result.stdout


def test_refuses_an_unknown_job() -> None:
    result = run_script("dmeo")
    assert result.returncode == 2
    assert "./run demo" in result.stdout


def test_prints_the_one_line_that_installs_what_is_missing(bare_path: Path) -> None:
    result = run_script("demo", PATH=str(bare_path), PYTHON="python3")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "apt-get install" in line
    for package in ("python3", "python3-venv", "python3-dev", "g++"):
        assert f" {package}" in line


def test_names_only_what_is_missing(bare_path: Path) -> None:
    result = run_script("demo", PATH=str(bare_path), PYTHON=sys.executable)
    assert result.returncode == 1
    assert " g++" in result.stderr
    assert "python3-venv" not in result.stderr


def test_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    # Has all modules, but answers the question for its version with "too old".
    old.write_text(
        '#!/bin/sh\ncase "$*" in\n  *version_info*) exit 1 ;;\n  -V) echo Python 3.9.2 ;;\nesac\n'
    )
    old.chmod(0o755)
    result = run_script("demo", PYTHON=str(old))
    assert result.returncode == 1
    assert "3.10" in result.stderr
    assert "Python 3.9.2" in result.stderr
