"""Choice of the backend: precedence, obstacles, fallbacks, the native library, the report."""

import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ca3d_kernels import UnsupportedInputError, __main__, backends, use_backend
from ca3d_kernels.backends import Implementation


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str | None]]:
    """An op whose backends name themselves; the dictionary says why one is unavailable."""
    obstacles: dict[str, str | None] = {"cuda": None, "triton": None, "cpu": None}
    monkeypatch.delenv("CA3D_BACKEND", raising=False)

    def unavailable(backend: str, device: str) -> str | None:
        serves = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}
        if backend != "reference" and serves[backend] != device:
            return f"it serves {serves[backend]} tensors only"
        return obstacles.get(backend)

    for name in backends.NAMES:
        backends.register(
            "toy",
            Implementation(name, lambda n=name: n, lambda device, n=name: unavailable(n, device)),
        )
    yield obstacles
    del backends._implementations["toy"]


def chosen(device: str = "cuda", argument: str | None = None) -> str:
    return backends.run("toy", device, backends.requested(argument), lambda name: name)


def test_fastest_available_by_default(toy: dict) -> None:
    assert chosen() == "cuda"
    assert chosen("cpu") == "cpu"
    toy["cuda"] = "no driver"
    assert chosen() == "triton"
    toy["triton"] = toy["cpu"] = "not installed"
    assert chosen() == chosen("cpu") == "reference"


def test_argument_then_context_then_environment(toy: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CA3D_BACKEND", "reference")
    assert chosen() == "reference"
    with use_backend("triton"):
        assert chosen() == "triton"
        assert chosen(argument="cuda") == "cuda"
        with use_backend("cuda"):
            assert chosen() == "cuda"
        assert chosen() == "triton"
    assert chosen() == "reference"


def test_environment_is_ignored_on_devices_that_its_backend_does_not_serve(
    toy: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CA3D_BACKEND", "triton")
    assert chosen("cuda") == "triton"
    assert chosen("cpu") == "cpu"
    monkeypatch.setenv("CA3D_BACKEND", "auto")
    assert chosen("cuda") == "cuda"


def test_demanded_backend_that_can_not_run(toy: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    toy["triton"] = "triton is not installed"
    words = r"backend='triton' can't run toy on cuda tensors: triton is not installed; "
    with pytest.raises(ValueError, match=words + "allowed here: auto, cuda, reference"):
        chosen(argument="triton")
    with use_backend("triton"), pytest.raises(ValueError, match=words):
        chosen()
    monkeypatch.setenv("CA3D_BACKEND", "triton")
    with pytest.raises(ValueError, match="CA3D_BACKEND='triton' can't run toy"):
        chosen()


def test_a_backend_without_a_kernel_of_the_op_leaves_it_to_the_next(
    toy: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(backends._implementations["toy"], "cuda")
    with use_backend("cuda"):
        assert chosen() == "triton"
        toy["triton"] = "not installed"
        assert chosen() == "reference"
    monkeypatch.setenv("CA3D_BACKEND", "cuda")
    assert chosen() == "reference"
    assert chosen("cpu") == "cpu"
    with (
        use_backend("cuda", fallback=False),
        pytest.raises(ValueError, match="can't run toy on cuda tensors: cuda has no kernel for"),
    ):
        chosen()


def test_devices_that_no_backend_serves(toy: dict) -> None:
    with pytest.raises(ValueError, match="toy can't run on meta tensors, only on cpu, cuda"):
        chosen("meta")


def test_unknown_names(toy: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'gpu'"):
        chosen(argument="gpu")
    with pytest.raises(ValueError, match=r"name must be one of .*, got 'gpu'"), use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match="backend must be one of"):
        backends.register("toy", Implementation("gpu", lambda: None, lambda device: None))
    monkeypatch.setenv("CA3D_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"CA3D_BACKEND must be one of .*, got 'gpu'"):
        chosen()


def test_context_is_per_thread(toy: dict) -> None:
    seen = []
    with use_backend("reference"):
        worker = threading.Thread(target=lambda: seen.append(chosen()))
        worker.start()
        worker.join()
    assert seen == ["cuda"]


def test_refused_input_goes_on_with_one_warning(toy: dict) -> None:
    def call(name: str) -> str:
        if name in ("cuda", "triton"):
            raise UnsupportedInputError("head_dim 512 is above 256")
        return name

    with pytest.warns(RuntimeWarning) as caught:
        assert backends.run("toy", "cuda", "", call) == "reference"
    assert [str(warning.message) for warning in caught] == [
        f"the {name} kernel of toy can't take this input (head_dim 512 is above 256); using {next_}"
        for name, next_ in (("cuda", "triton"), ("triton", "reference"))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.run("toy", "cuda", "", call) == "reference"
    with (
        use_backend("cuda", fallback=False),
        pytest.raises(UnsupportedInputError, match="head_dim 512"),
    ):
        backends.run("toy", "cuda", "cuda", call)


def test_missing_library_warns_once_and_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CA3D_REQUIRE_NATIVE", raising=False)
    monkeypatch.setattr(backends, "_load_native", lambda: (None, "it can't be loaded. Reinstall."))
    backends._warn_missing_native.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="Reinstall.*slow reference backend"):
            assert backends.native() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert backends.native() is None
            assert backends.native_lacks("anything") == "the compiled library is missing"
        monkeypatch.setenv("CA3D_REQUIRE_NATIVE", "1")
        with pytest.raises(ImportError, match="CA3D_REQUIRE_NATIVE=1, but it can't be loaded"):
            backends.native()
    finally:
        backends._warn_missing_native.cache_clear()


def test_library_of_another_version_is_noticed() -> None:
    if backends.native() is None:
        pytest.skip("the compiled library is missing")
    assert backends.native_lacks("local_attention_forward") is None
    assert "it has no warp_drive" in (backends.native_lacks("warp_drive") or "")


def test_report_names_every_op_and_reason() -> None:
    text = __main__.report()
    for op in backends.ops():
        assert f"{op} on cpu: " in text
        assert f"{op} on cuda: " in text
    assert torch.__version__ in text
    for line in __main__._choices():
        assert line.count(":") == 1


def test_duplicate_openmp_runtimes_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = [
        "7f1-7f2 r-xp 0 08:01 42   /a/torch/lib/libgomp.so.1",
        "7f3-7f4 r-xp 0 08:01 43   /a b/libomp.so",
        "7f3-7f4 r-xp 0 08:01 43   /a b/libomp.so",
        "7f5-7f6 r-xp 0 08:01 44   /a/libcompress.so",
        "7f7-7f8 rw-p 0 00:00 0",
    ]
    found = __main__.openmp_runtimes(maps)
    assert found == ["/a b/libomp.so", "/a/torch/lib/libgomp.so.1"]
    if backends.native() is not None:
        monkeypatch.setattr(__main__, "openmp_runtimes", lambda: found)
        assert "several OpenMP runtimes" in __main__.report()


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--help"]) == 0
    assert __main__.main(["nonsense"]) == 2
    assert "usage" in capsys.readouterr().out


def test_examples_of_this_file_alone() -> None:
    root = Path(__file__).parents[2]
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--doctest-modules"]
    done = subprocess.run(
        [sys.executable, *words, "ca3d_kernels/backends.py"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
