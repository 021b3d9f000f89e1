"""A program of ExecuTorch gives the model's logits in its own runtime."""

import pytest
import torch

from ca3d.cli import main
from ca3d.export import to_executorch
from ca3d.export.options import ExportConfig
from ca3d.export.run import export


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_clips_equal_the_model(precision, weights_path, tmp_path):
    # The extra `all`, with which these tests are meant to run, brings it.
    pytest.importorskip("executorch", reason='needs pip install "ca3d-kernels[executorch]"')
    result = export(
        ExportConfig("executorch", str(weights_path), str(tmp_path), precision=precision, rounds=1)
    )
    (clip,) = result.comparisons
    assert clip.files == ("clip.pte",)
    assert clip.bytes == (tmp_path / "clip.pte").stat().st_size
    assert clip.same_class == 1
    limit = 1e-5 if precision == "float32" else 0.01
    assert 0 <= clip.difference / clip.scale < limit
    run = to_executorch.classifier(tmp_path / "clip.pte", 1)
    assert run(torch.zeros(3, 3, 8, 32, 32)).shape == (3, 2)


def test_a_missing_package_is_named(weights_path, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "executorch", None)
    out = tmp_path / "out"
    assert main(["export", "executorch", str(weights_path), "--out", str(out)]) == 1
    assert 'pip install "ca3d-kernels[executorch]"' in capsys.readouterr().err.splitlines()[-1]
