"""The compiled library as Python calls it, built with sanitizers, under the kernels' own tests."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from commands import attempt, run, tool

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
KERNEL_TESTS = (
    "folded_conv/test_parity.py",
    "local_attention/test_native.py",
    "local_attention/test_parity.py",
    "norm_relu_conv/test_native.py",
    "norm_relu_conv/test_parity.py",
    "preparam_step/test_parity.py",
    "preparam_step/test_plan.py",
    "preparam_step/test_remembered_magnitudes.py",
    "temporal_block/test_parity.py",
)

# Every program below runs in the folder of the sanitized package and starts with this.
LOAD = """
import sys
from pathlib import Path
from ca3d_kernels import backends
native = backends.native()
assert Path(native.__file__).parent == Path.cwd() / "ca3d_kernels", native.__file__
"""

RUN_TESTS = LOAD + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"

# Each takes the number of elements or frames that it claims beyond those that it has.
OVERRUNS = {
    "local_attention": """
import numpy as np
frames, head_dim = 20, 64
tensors = [np.zeros((frames, head_dim), np.float32) for _ in range(4)]
rows = [(x.ctypes.data, x.size, x.size, x.size, head_dim) for x in tensors]
sizes = (1, 1, 1, frames + int(sys.argv[1]), head_dim)
native.local_attention_forward("float32", sizes, (3, 1, 0, 0), 0.125, [], *rows, 1)
""",
    "norm_relu_conv": """
import numpy as np
rows, channels = 100, 20
y, z = (np.zeros((rows, channels), np.float32) for _ in range(2))
columns = [np.zeros(channels).ctypes.data for _ in range(4)]
matrix = (rows + int(sys.argv[1]), channels)
addresses = (y.ctypes.data, 0, columns[2:], z.ctypes.data)
native.normalise("float32", matrix, True, columns[:2], 1e-5, *addresses, 1)
""",
    "preparam_step": """
import numpy as np
count = 1000
tensors = [np.zeros(count, np.float32) for _ in range(4)]
table = np.array([*(x.ctypes.data for x in tensors), 0, count + int(sys.argv[1]), 0], np.int64)
hyper = (0.1, 0.9, 0.0, 0.0, 128.0, 1.0)
native.preparam_sgd_step(table, "float32", "float32", hyper, False, "nearest", (0, 0), 1)
""",
}


def runtime(name: str) -> str:
    """Path of a runtime library of the compiler, without which the test is skipped."""
    path = run(tool("g++"), f"-print-file-name={name}").strip()
    if not os.path.isabs(path):
        pytest.skip(f"the compiler has no {name}")
    return path


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """What a process needs that loads the sanitized library."""
    return {
        # Python itself isn't sanitized. With libstdc++ missing at the start, a sanitizer fails at
        # the first exception.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps memory until it ends
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "CA3D_REQUIRE_NATIVE": "1",
        "PYTEST_ADDOPTS": "",
    }


@pytest.fixture(scope="module")
def folder(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and a sanitized library; that of the source tree stays as it is."""
    folder = tmp_path_factory.mktemp("sanitized").resolve()
    shutil.copytree(
        ROOT / "ca3d_kernels",
        folder / "ca3d_kernels",
        ignore=shutil.ignore_patterns("_native*.so", "_cuda*.so", "__pycache__"),
    )
    run(
        *(sys.executable, "setup.py", "build_ext", "--build-lib", folder),
        cwd=ROOT,
        CXX=tool("g++"),
        CXXFLAGS="-O1",
        CA3D_BUILD_TYPE="None",  # no options beyond CXXFLAGS
        CA3D_SANITIZE="address,undefined",
        CA3D_CUDA="off",
    )
    (library,) = (folder / "ca3d_kernels").glob("_native*.so")
    code = library.read_bytes()
    assert b"__asan_report" in code
    assert b"__ubsan_handle" in code
    return folder


def test_kernels_under_their_own_tests(folder: Path, environment: dict[str, str]) -> None:
    tests = [ROOT / "tests/ca3d_kernels" / name for name in KERNEL_TESTS]
    options = ("-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider", "-q")
    # The reference backend has nothing compiled, and emulated CUDA kernels are another library.
    options = (*options, "-k", "not reference] and not cuda")
    output = run(sys.executable, "-c", RUN_TESTS, *options, *tests, cwd=folder, **environment)
    assert " passed" in output
    assert " skipped" not in output


@pytest.mark.parametrize("op", OVERRUNS)
def test_an_access_beyond_a_tensor_is_reported(
    op: str, folder: Path, environment: dict[str, str]
) -> None:
    program = (sys.executable, "-c", LOAD + OVERRUNS[op])
    run(*program, "0", cwd=folder, **environment)
    status, output = attempt(*program, "1", cwd=folder, **environment)
    assert status != 0
    assert "AddressSanitizer: heap-buffer-overflow" in output
    assert f"{op}_cpu.cpp" in output  # in the kernel itself
