"""The `run` script: what it says when something is missing, and when it compiles."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "run"


def run_script(
    *arguments: str, script: Path = RUN, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *arguments],
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


# Stands for the Python of the virtual environment: `pip install -e` leaves a library behind, and
# fails when asked to; every `pip install` is noted.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *"-m pip install"*)
    echo "$*" >>"$VIRTUAL/pip.log"
    [ -z "${FAIL:-}" ] || exit 1
    case "$*" in *" -e "*) echo kernels >ca3d_kernels/_native.so; pwd >"$VIRTUAL/$URL" ;; esac ;;
  *-VV*) echo "Python ${VERSION:-3.11}" ;;
esac
"""
URL = "lib/python3/site-packages/ca3d_kernels-0.1.0.dist-info/direct_url.json"


class Clone:
    """A clone with a virtual environment, neither of which compiles anything."""

    def __init__(self, folder: Path, virtual: Path) -> None:
        self.folder, self.virtual = folder, virtual
        for name in ("csrc", "cmake", "ca3d_kernels"):
            (folder / name).mkdir(parents=True)
            (folder / name / "file").touch()
        for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "constraints.txt"):
            (folder / name).touch()
        shutil.copy(RUN, folder)
        python = virtual / "bin" / "python"
        if not python.exists():
            python.parent.mkdir(parents=True)
            (virtual / URL).parent.mkdir(parents=True)
            python.write_text(FAKE_PYTHON)
            python.chmod(0o755)

    def install(self, extras: str = "app", fails: bool = False, **environment: str) -> bool:
        """Runs `./run install`; returns whether it compiled."""
        log = self.virtual / "pip.log"
        log.unlink(missing_ok=True)
        result = run_script(
            "install",
            extras,
            script=self.folder / "run",
            CA3D_VENV=str(self.virtual),
            PYTHON="true",
            VIRTUAL=str(self.virtual),
            URL=URL,
            **{"CXX": "true", "FAIL": "1" if fails else "", **environment},
        )
        assert bool(result.returncode) == fails, result.stderr
        (line,) = log.read_text().splitlines()
        assert f"[{extras}]" in line
        assert "-c constraints.txt" in line
        assert ("compiling" in result.stdout) == (" -e " in line)
        return " -e " in line


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    clone = Clone(tmp_path / "clone", tmp_path / "virtual")
    assert clone.install()
    return clone


def test_compiles_once_whatever_the_extras(clone: Clone) -> None:
    assert not clone.install()
    assert not clone.install("all")
    assert not clone.install(CA3D_BACKEND="reference")


@pytest.mark.parametrize(
    "name", ["csrc/file", "csrc/new", "cmake/file", "setup.py", "pyproject.toml", "constraints.txt"]
)
def test_compiles_again_after_a_change(clone: Clone, name: str) -> None:
    (clone.folder / name).write_text("changed")
    assert clone.install()
    assert not clone.install()
    (clone.folder / name).unlink()
    (clone.folder / name).touch()
    assert clone.install()


@pytest.mark.parametrize(
    "environment",
    [{"CA3D_CUDA": "off"}, {"CA3D_CUDA_ARCHS": "90"}, {"CXX": "echo"}, {"VERSION": "3.12"}],
    ids=str,
)
def test_compiles_again_for_other_tools_and_options(
    clone: Clone, environment: dict[str, str]
) -> None:
    assert clone.install(**environment)
    assert not clone.install(**environment)


def test_compiles_again_what_is_gone_or_replaced(clone: Clone) -> None:
    library = clone.folder / "ca3d_kernels" / "_native.so"
    library.unlink()
    assert clone.install()
    library.write_text("built by hand")
    assert clone.install()
    (clone.virtual / URL).unlink()
    assert clone.install()
    assert not clone.install()


def test_an_installation_that_failed_is_done_again(clone: Clone) -> None:
    source = clone.folder / "csrc" / "file"
    source.write_text("changed")
    assert clone.install(fails=True)
    source.write_text("")
    assert clone.install()


def test_an_environment_belongs_to_one_clone(clone: Clone, tmp_path: Path) -> None:
    other = Clone(tmp_path / "other", clone.virtual)
    assert other.install()
    assert not other.install()
    assert clone.install()
