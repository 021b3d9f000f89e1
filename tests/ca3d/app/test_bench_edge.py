"""`ca3d bench edge` measures every way of running a model, and names what it can't."""

import json

import pytest
import torch

from ca3d import edge_bench, models
from ca3d.cli import main
from ca3d.edge_bench import BenchConfig, Candidate, bench, make_candidates, missing


def small(**options):
    defaults = {"model": "ca3d_tiny", "size": 16, "rounds": 2, "threads": "1", "strides": "1,2"}
    return BenchConfig("edge", **{**defaults, "runtimes": "torch", "peers": "", **options})


def test_rows_of_torch(tmp_path, capsys):
    file = tmp_path / "edge.json"
    words = ["--model=ca3d_tiny", "--size=16", "--rounds=2", "--threads=1", "--strides=1,2"]
    words += ["--runtimes=torch", "--peers=nobody", "--precisions=float32", f"--json={file}"]
    assert main(["bench", "edge", *words]) == 0
    rows = json.loads(file.read_text())
    assert [row["stride"] for row in rows] == [None, 1, 2]
    for row in rows:
        times = row["milliseconds"]
        assert 0 < times["p50"] <= times["p90"] <= times["p99"]
        assert row["frames_per_second"] == pytest.approx(
            (row["stride"] or 16) * row["windows_per_second"]
        )
    assert rows[0]["state_bytes"] is None
    assert rows[1]["state_bytes"] > rows[2]["state_bytes"] > 0
    printed = capsys.readouterr()
    assert "ca3d_tiny torch float32, stream by 2" in printed.out
    assert "nobody: no model of this name here" in printed.err
    assert main(["bench", "edge", *words]) == 1
    assert "exists already; --force replaces it" in capsys.readouterr().err


def test_candidates_compute_the_same_window(tmp_path):
    """The stream's first step sees the whole clip's frames, shifted by what is pushed again."""
    clip, stream = make_candidates(small(strides="16", precisions="float32"), tmp_path)
    logits = clip.load(1)[0]()
    assert torch.allclose(stream.load(1)[0](), logits[0], atol=1e-5)


def test_peers_run_fused(tmp_path):
    peers = small(strides="", precisions="float32", peers="r3d_tiny,x3d_tiny")
    candidates = make_candidates(peers, tmp_path)
    assert [c.model for c in candidates] == ["ca3d_tiny", "r3d_tiny", "x3d_tiny"]
    for candidate in candidates:
        assert candidate.load(1)[0]().isfinite().all()


@pytest.mark.slow
def test_memory_is_measured_apart(tmp_path):
    candidate = make_candidates(small(strides="", precisions="float32"), tmp_path)[0]
    peak = edge_bench._memory_apart(candidate)
    assert sum(p.nbytes for p in models.create("ca3d_tiny", 101).parameters()) < peak < 1e9


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(edge_bench.importlib.util, "find_spec", lambda name: None)
    assert [line.partition(":")[0] for line in missing(small(runtimes=None, peers="r9d"))] == [
        "torch",
        "onnx",
        "executorch",
        "r9d",
    ]
    with pytest.raises(edge_bench.UserError, match=r"onnx: not installed .*ca3d-kernels\[onnx\]"):
        bench(small(runtimes="onnx"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "r9d"}, "--model 'r9d' is not known"),
        ({"runtimes": "tflite"}, "--runtimes must be of torch, onnx, executorch, not 'tflite'"),
        ({"precisions": "int4"}, "--precisions must be of float32, float16, int8, not 'int4'"),
        ({"strides": "1,x"}, "--strides must be numbers of at least 1"),
        ({"strides": "1,17"}, "--strides must be at most a clip's 16 frames: '1,17'"),
        ({"threads": "0"}, "--threads must be numbers of at least 1"),
        ({"rounds": 0}, "--rounds must be at least 1, not 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(edge_bench.UserError, match=message):
        bench(small(**options))


def test_suite_must_be_edge(capsys):
    assert main(["bench", "cloud"]) == 1
    assert "SUITE must be edge, not 'cloud'" in capsys.readouterr().err


def test_names_are_for_people():
    candidate = Candidate("ca3d", "onnx", "int8", None, "x", 1, 16, 112)
    assert candidate.name == "ca3d onnx int8, whole clip"
