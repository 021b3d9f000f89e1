"""A run that is killed at any moment and resumed ends as if it had never been killed."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_videos import TINY, flags

from ca3d import precision
from ca3d.errors import UserError
from ca3d.training import TrainConfig, train

KILLING = Path(__file__).parents[2] / "helpers" / "killing.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# What may differ between two runs of the same job.
CLOCK = {"seconds", "waiting", "clips_per_second"}


def config(bars: Path, out: Path, **options: Any) -> dict[str, Any]:
    return {
        **TINY,
        "data": str(bars),
        "out": str(out),
        "progress": "none",
        "epochs": 3,
        "checkpoint_steps": 1,
        **options,
    }


def lives(bars: Path, out: Path, plan: list[Any], **options: Any) -> int:
    """Runs a job through all deaths of a plan; returns how often it was killed."""
    folder = out.parent
    (folder / "config.json").write_text(json.dumps(config(bars, out, **options)))
    (folder / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, str(KILLING), str(folder / "config.json"), str(folder / "plan.json")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(json.loads(done.stdout.splitlines()[-1])["killed"])


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in r.items() if k not in CLOCK} for r in csv.DictReader(file)]


def assert_same_run(first: Path, second: Path) -> None:
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = load_file(first / name), load_file(second / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), (name, key)
    assert rows(first) == rows(second)
    ours = json.loads((first / "test" / "results.json").read_text())
    theirs = json.loads((second / "test" / "results.json").read_text())
    for key in ("top1", "loss", "epoch", "per_class"):
        assert ours[key] == theirs[key]
    states = [torch.load(run / "resume.pt", weights_only=True) for run in (first, second)]
    assert states[0]["random"]["torch"].equal(states[1]["random"]["torch"])
    momentum = [
        [s["momentum_buffer"] for s in state["optimizer"]["state"].values()] for state in states
    ]
    assert all(torch.equal(a, b) for a, b in zip(*momentum, strict=True))


@pytest.fixture(scope="module")
def whole(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert lives(bars, out, []) == 0
    return out


def test_killed_at_random_moments(bars: Path, whole: Path, tmp_path: Path) -> None:
    draw = random.Random(11)
    # A life is about a second of training here: some die early, some late, some just after birth.
    plan = [["seconds", round(draw.uniform(0.0, 0.4), 3)] for _ in range(6)]
    killed = lives(bars, tmp_path / "run", plan, workers=2)
    assert killed >= 3
    assert_same_run(whole, tmp_path / "run")


def test_killed_around_the_writing_of_files(bars: Path, whole: Path, tmp_path: Path) -> None:
    # Every life goes on from what the last one left, so small numbers visit all kinds of files.
    plan = [[when, n] for n in (1, 2, 3, 5, 8) for when in ("before", "after")]
    killed = lives(bars, tmp_path / "run", plan)
    assert killed >= 8
    assert_same_run(whole, tmp_path / "run")


# With a pre-parameter among the optimizer's state, and without.
SCALED = ["float16", "float16-published", "float16-sqr", "float16-root", "qat"]
PLAIN = ["bfloat16", "raw-float16", "fake-quant", "ptq-float16"]


def test_every_regime_is_killed_somewhere() -> None:
    assert {"float32", *SCALED, *PLAIN} == set(precision.names())


@pytest.mark.parametrize(
    "name",
    [
        "float16",
        *(pytest.param(name, marks=pytest.mark.slow) for name in [*SCALED[1:], *PLAIN]),
    ],
)
def test_killed_in_another_regime(name: str, bars: Path, tmp_path: Path) -> None:
    for part in ("whole", "killed"):
        (tmp_path / part).mkdir()
    assert lives(bars, tmp_path / "whole" / "run", [], precision=name) == 0
    plan = [["after", 4], ["before", 5]]
    assert lives(bars, tmp_path / "killed" / "run", plan, precision=name) == 2
    runs = [tmp_path / part / "run" for part in ("whole", "killed")]
    assert_same_run(*runs)
    if name in SCALED:
        states = [torch.load(run / "resume.pt", weights_only=True)["optimizer"] for run in runs]
        thetas = [[s["pre_parameter"] for s in state["state"].values()] for state in states]
        assert all(torch.equal(a, b) for a, b in zip(*thetas, strict=True))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_killed_around_every_write_with_accumulation(bars: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    options = {"accumulate": 2, "precision": "bfloat16", "epochs": 2, "optimizer": "sgd"}
    lives(bars, tmp_path / "whole" / "run", [], **options)
    for when, first in (("before", 1), ("after", 2)):
        for n in range(first, 22, 2):
            folder = tmp_path / f"{when}{n}"
            folder.mkdir()
            lives(bars, folder / "run", [[when, n]], **options)
            assert_same_run(tmp_path / "whole" / "run", folder / "run")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_leave(
    bars: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    out = tmp_path / "run"
    options = config(bars, out, progress="plain", log_steps=1)
    options["checkpoint_steps"] = 0
    options["workers"] = 2
    command = [sys.executable, "-m", "ca3d", "train", *flags(options), "--resume", "auto"]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/3  batch 2/"):
            # As `timeout`, systemd and a terminal do: to the workers as well.
            os.killpg(process.pid, number)
            break
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "--resume auto" in output
    assert "Traceback" not in errors
    state = torch.load(out / "resume.pt", weights_only=True)
    assert not state["progress"]["finished"]
    assert state["progress"]["epoch"] * 100 + state["progress"]["batch"] >= 2
    assert (out / "last.safetensors").is_file()
    # Thread counts change the order of sums; the other runs have one thread, too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(TrainConfig(**{**options, "resume": "auto"}))
    finally:
        torch.set_num_threads(threads)
    assert "resumed at epoch" in capsys.readouterr().out
    assert_same_run(whole, out)


def test_a_finished_run_is_not_trained_again(bars: Path, whole: Path) -> None:
    before = (whole / "last.safetensors").stat().st_mtime_ns
    result = train(TrainConfig(**{**config(bars, whole), "resume": "auto"}))
    assert result.test is not None
    assert (whole / "last.safetensors").stat().st_mtime_ns == before


def test_test_results_of_a_run_whose_state_is_gone_are_no_other_run_s(
    bars: Path, whole: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(whole, gone)
    (gone / "resume.pt").unlink()
    before = (gone / "best.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"holds test results, but not the resume.pt"):
        train(TrainConfig(data=str(bars), out=str(gone), resume="auto"))
    assert (gone / "best.safetensors").read_bytes() == before


def test_a_run_is_not_overwritten(bars: Path, whole: Path) -> None:
    with pytest.raises(UserError, match="already holds a run"):
        train(TrainConfig(**config(bars, whole)))


def test_other_options_are_refused(bars: Path, whole: Path) -> None:
    options = config(bars, whole, lr=0.02, resume="auto")
    with pytest.raises(UserError, match=r"--lr was 0.01, is 0.02"):
        train(TrainConfig(**options))
