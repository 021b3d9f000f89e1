"""What importing the package does and doesn't, each time in a fresh process."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

PACKAGE_ROOT = str(Path(__file__).parents[2])


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    cleaned = {key: value for key, value in os.environ.items() if not key.startswith("CA3D_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**cleaned, "PYTHONPATH": PACKAGE_ROOT, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


ATTEND = """
import torch
from ca3d_kernels import local_temporal_attention
q = torch.randn(3, 2, 4, 8)
print(local_temporal_attention(q, q, q).shape)
"""
HIDE_NATIVE = "import sys; sys.modules['ca3d_kernels._native'] = None\n"


def test_import_loads_neither_triton_nor_the_library() -> None:
    result = run("""
        import sys, torch
        before = set(sys.modules)
        import ca3d_kernels
        added = {name.partition(".")[0] for name in set(sys.modules) - before}
        assert "ca3d_kernels._native" not in sys.modules
        assert "triton" not in added, added
        assert not torch.cuda.is_initialized()
        print(sorted(added - set(sys.stdlib_module_names)))
    """)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['ca3d_kernels']"


def test_without_the_library_the_reference_runs_with_one_warning() -> None:
    result = run(HIDE_NATIVE + ATTEND + "local_temporal_attention(q, q, q)")
    assert result.returncode == 0, result.stderr
    assert "torch.Size([3, 2, 4, 8])" in result.stdout
    assert result.stderr.count("slow reference backend") == 1
    assert "Install a C++17 compiler" in result.stderr


def test_a_missing_library_is_an_error_on_demand() -> None:
    result = run(HIDE_NATIVE + ATTEND, CA3D_REQUIRE_NATIVE="1")
    assert result.returncode == 1
    assert "ImportError: CA3D_REQUIRE_NATIVE=1, but the compiled library" in result.stderr


def test_a_source_tree_that_hides_an_installed_copy_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca3d_kernels").mkdir()
    (tmp_path / "ca3d_kernels" / "_native.so").touch()
    result = run(HIDE_NATIVE + ATTEND, PYTHONPATH=os.pathsep.join((PACKAGE_ROOT, str(tmp_path))))
    assert result.returncode == 0, result.stderr
    assert f"The source tree {PACKAGE_ROOT} hides the installed package in {tmp_path}" in (
        result.stderr
    )


def test_without_optional_packages() -> None:
    hide = "import sys\nfor name in ('triton', 'numpy'): sys.modules[name] = None\n"
    result = run(hide + ATTEND)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([3, 2, 4, 8])" in result.stdout


def test_report_without_library_gpu_and_triton() -> None:
    code = "sys.modules['triton'] = None; import runpy; runpy.run_module('ca3d_kernels')"
    result = run(HIDE_NATIVE + code.replace("('ca3d_kernels')", "('ca3d_kernels.__main__', "
                 "run_name='__main__')"), CUDA_VISIBLE_DEVICES="")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "compiled library  missing" in result.stdout
    assert "no GPU that torch can use" in result.stdout
    assert "local_attention on cpu: reference" in result.stdout


def test_environment_chooses_the_backend() -> None:
    code = ATTEND + "import sys; assert 'ca3d_kernels._native' not in sys.modules"
    result = run(code, CA3D_BACKEND="reference")
    assert result.returncode == 0, result.stderr
