"""Several gloo processes on the CPU train, evaluate and resume as one process does."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_folders import make_ucf101, real
from safetensors.torch import load_file
from tiny_videos import TINY, flags, make_folder

from ca3d.errors import UserError
from ca3d.training import TrainConfig
from ca3d.training.distributed import World, connect
from ca3d.training.metrics import Metrics
from ca3d.training.scoring import Scores, merge
from ca3d.training.step import training_batches

WORKERS = Path(__file__).parents[2] / "helpers" / "workers.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CURVE = {"model_options": {"widths": [4, 4, 8, 8], "dropout": 0.0}, "epochs": 2, "lr": 1e-4}
HALF = {"precision": "float16", "checkpoint_steps": 1, "sync_bn": True}


@pytest.fixture(scope="module")
def ucf101(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny UCF101 of 20 training, 4 validation and 8 test videos; one of each can't be used."""
    videos = make_ucf101(tmp_path_factory.mktemp("ucf101"), real)
    (videos / "Archery" / "v_Archery_g03_c01.avi").unlink()
    (videos / "Archery" / "v_Archery_g01_c02.avi").write_bytes(b"no video")
    return videos


@pytest.fixture(scope="module")
def runs(ucf101: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs and steps that the tests below look at, made by one process and its children."""
    folder = tmp_path_factory.mktemp("runs")

    def options(name: str, **changed: Any) -> dict[str, Any]:
        base = {**TINY, "data": str(ucf101), "progress": "none"}
        return {**base, "out": str(folder / name), **changed}

    def job(processes: int, call: str, dies: bool = False, **arguments: Any) -> dict[str, Any]:
        return {"processes": processes, "call": call, "dies": dies, "arguments": arguments}

    killed = {**options("killed", **HALF), "resume": "auto"}
    jobs = [
        job(1, "world_jobs:train_in_float64", **options("one", **CURVE)),
        job(2, "world_jobs:train_in_float64", **options("two", **CURVE, sync_bn=True)),
        job(2, "workers:train", **options("whole", **HALF)),
        job(2, "killing:live", dies=True, config=killed, moment=["after", 5]),
        job(2, "workers:train", **killed),
        *(
            job(n, "world_jobs:step", out=str(folder / f"{n}.pt"), dtype="float64")
            for n in (1, 2, 3)
        ),
        job(3, "world_jobs:step", out=str(folder / "o.pt"), dtype="float64", ordered=True),
        job(2, "world_jobs:sum_of_halves", out=str(folder / "h.pt"), ordered=False),
        job(3, "world_jobs:sum_of_halves", out=str(folder / "ho.pt"), ordered=True),
        job(3, "world_jobs:shares", length=7),
    ]
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(WORKERS), str(file)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [line.partition(": ")[2] for line in done.stdout.splitlines() if "answers: " in line]
    (folder / "answers.json").write_text(json.dumps([json.loads(a) for a in answers]))
    return folder


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_loss_curve_is_that_of_one_process(runs: Path) -> None:
    """In float64 the only difference is the order of sums, 1e-16 at first, which each of the ten
    steps of so small a model multiplies. The validation loss is computed in float32.
    """
    one, two = rows(runs / "one" / "metrics.csv"), rows(runs / "two" / "metrics.csv")
    assert len(one) == len(two) == 2
    for ours, theirs in zip(two, one, strict=True):
        for name, bound in (("train_loss", 1e-6), ("val_loss", 1e-5)):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=bound)
        for name in ("train_accuracy", "val_accuracy", "val_count", "steps", "skipped", "lr"):
            assert ours[name] == theirs[name]
    assert one[0]["train_loss"] != one[1]["train_loss"]
    first, second = (load_file(runs / name / "last.safetensors") for name in ("one", "two"))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=1e-6, atol=1e-6), name


def test_every_video_is_evaluated_once(ucf101: Path, runs: Path) -> None:
    one, two = (
        json.loads((runs / name / "test" / "results.json").read_text()) for name in ("one", "two")
    )
    assert two["videos"] == one["videos"] == 7
    assert len(two["broken"]) == 1
    for name in ("top1", "top5", "mean_class", "per_class"):
        assert two[name] == one[name]
    ours, theirs = (rows(runs / name / "test" / "predictions.csv") for name in ("two", "one"))
    assert len({row["path"] for row in ours}) == 7
    assert [row["path"] for row in ours] == [row["path"] for row in theirs]
    assert [row["predicted"] for row in ours] == [row["predicted"] for row in theirs]


def test_files_of_a_run_are_listed_once(ucf101: Path, runs: Path) -> None:
    for name in ("one", "two", "killed"):
        lists = runs / name / "splits"
        assert [row["path"] for row in rows(lists / "missing.csv")] == [
            str(ucf101 / "Archery" / "v_Archery_g03_c01.avi")
        ]
        unreadable = rows(lists / "unreadable.csv")
        assert [Path(row["path"]).name for row in unreadable] == ["v_Archery_g01_c02.avi"]
        listed = [len(rows(lists / f"{split}.csv")) for split in ("train", "val", "test")]
        assert sum(listed) == 31


@pytest.mark.parametrize("file", ["2.pt", "3.pt", "o.pt"])
def test_gradients_and_statistics_of_a_step(runs: Path, file: str) -> None:
    one, more = (torch.load(runs / name, weights_only=True) for name in ("1.pt", file))
    for part in ("gradients", "buffers"):
        assert one[part].keys() == more[part].keys()
        for name, tensor in one[part].items():
            assert torch.allclose(tensor, more[part][name], rtol=1e-9, atol=1e-12), name


def test_float16_gradients_are_summed_in_float16(runs: Path) -> None:
    answers = json.loads((runs / "answers.json").read_text())
    assert answers[-3] == [["torch.float16"]] * 2
    assert answers[-2] == [["torch.float16"]] * 3
    for name in ("h.pt", "ho.pt"):
        state = torch.load(runs / name, weights_only=True)
        parts, total = state["parts"], state["sum"]
        expected = parts[0].clone()
        for part in parts[1:]:
            expected += part
        assert total.dtype == torch.float16
        assert torch.equal(total, expected)
        assert bool(total.isfinite().all())
        # A wider sum is another one.
        wide = sum(part.double() for part in parts)
        assert name == "h.pt" or not torch.equal(total, wide.half())


def test_shares_are_disjoint_and_complete(runs: Path) -> None:
    answers = json.loads((runs / "answers.json").read_text())
    assert sorted(place for share in answers[-1] for place in share) == list(range(7))


def test_a_killed_run_resumes_to_the_same_weights(runs: Path) -> None:
    """Float16, with dropout: every process goes on with its own random numbers."""
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = (load_file(runs / run / name) for run in ("killed", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    states = [
        torch.load(runs / run / "resume.pt", weights_only=True) for run in ("killed", "whole")
    ]
    assert states[0]["processes"] == 2
    for ours, theirs in zip(*(state["other_random"] for state in states), strict=True):
        assert torch.equal(ours["torch"], theirs["torch"])
    assert not torch.equal(states[0]["random"]["torch"], states[0]["other_random"][0]["torch"])


def test_another_number_of_processes_is_refused(ucf101: Path, runs: Path) -> None:
    from ca3d.training import train

    options = {**TINY, **HALF, "data": str(ucf101), "out": str(runs / "whole"), "resume": "auto"}
    with pytest.raises(UserError, match=r"was trained by 2 processes and can't be resumed by 1"):
        train(TrainConfig(**options))


def test_batches_too_small_for_all_processes_are_left_out() -> None:
    batches = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    config, sync = TrainConfig(), TrainConfig(sync_bn=True)
    assert training_batches(batches, config, World()) == batches
    assert training_batches(batches, sync, World(0, 2)) == batches
    assert training_batches(batches, config, World(0, 2)) == batches[:2]


def test_scores_are_put_together_by_place() -> None:
    def part(indices: list[int], labels: list[int], rows: list[list[float]]) -> Scores:
        metrics, probabilities = Metrics(2), torch.tensor(rows).view(-1, 2)
        metrics.update(probabilities, torch.tensor(labels, dtype=torch.int64))
        loss = float(len(rows)) if rows else float("nan")
        return Scores(metrics, loss, probabilities, torch.tensor(labels), torch.tensor(indices))

    even = part([0, 2], [0, 1], [[0.9, 0.1], [0.8, 0.2]])
    odd = part([1], [1], [[0.3, 0.7]])
    none = part([], [], [])
    merged = merge([even, odd, none])
    assert merged.indices.tolist() == [0, 1, 2]
    assert merged.labels.tolist() == [0, 1, 1]
    assert merged.probabilities[1].tolist() == pytest.approx([0.3, 0.7])
    assert merged.metrics.count == 3
    assert merged.metrics.top1 == pytest.approx(2 / 3)
    assert merged.loss == pytest.approx((2 * 2 + 1) / 3)


def test_incomplete_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(UserError, match=r"RANK, MASTER_ADDR, MASTER_PORT is not set"),
        connect(torch.device("cpu")),
    ):
        pass


def children(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(number) for number in text.split()]


def rank_of(process: int) -> str | None:
    """The rank of a process that torchrun started."""
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    found = [v for v in variables if v.startswith(b"RANK=")]
    return found[0].decode().partition("=")[2] if found else None


def torchrun(options: dict[str, Any], kill: list[str], log: Path) -> int:
    """Trains in two processes under torchrun; kills the ranks of `kill`, one after the other, each
    when a life has taken some steps. Returns how many were killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=3", "-m", "ca3d", "train", *flags(options)]
    killed = 0
    with log.open("w") as file:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file)
        try:
            while process.poll() is None and killed < len(kill):
                lives = log.read_text().split("parameters, ")[1:]
                if len(lives) == killed + 1 and lives[-1].count("  batch ") >= 2:
                    for child in children(process.pid):
                        if rank_of(child) == kill[killed]:
                            os.kill(child, signal.SIGKILL)
                            killed += 1
                            break
                time.sleep(0.05)
            assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
        finally:
            process.kill()
    return killed


@pytest.mark.slow
def test_workers_end_with_a_killed_torchrun_and_the_run_goes_on(tmp_path: Path) -> None:
    bars = make_folder(tmp_path / "bars")
    options = {**TINY, "epochs": 4, "checkpoint_steps": 1, "log_steps": 1, "resume": "auto"}
    options = {**options, "data": str(bars), "out": str(tmp_path / "run"), "progress": "plain"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    log = tmp_path / "killed.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "-m", "ca3d", "train", *flags(options)],
            env=ENVIRONMENT,
            stdout=file,
            stderr=file,
        )
        while log.read_text().count("  batch ") < 2:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
    workers = [child for child in children(process.pid) if rank_of(child) is not None]
    assert len(workers) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(rank_of(worker) is not None for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert torchrun(options, [], tmp_path / "resumed.log") == 0
    assert "resumed at epoch" in (tmp_path / "resumed.log").read_text()


@pytest.mark.slow
def test_a_killed_worker_is_started_again_by_torchrun(tmp_path: Path) -> None:
    bars = make_folder(tmp_path / "bars")
    options = {**TINY, "epochs": 4, "sync_bn": True, "checkpoint_steps": 1, "log_steps": 1}
    options = {**options, "data": str(bars), "resume": "auto", "progress": "plain"}
    whole = {**options, "out": str(tmp_path / "whole")}
    killed = {**options, "out": str(tmp_path / "killed")}
    assert torchrun(whole, [], tmp_path / "whole.log") == 0
    assert torchrun(killed, ["1", "0"], tmp_path / "killed.log") == 2
    assert (tmp_path / "killed.log").read_text().count("resumed at epoch") == 2
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("killed", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    losses = [
        [row["train_loss"] for row in rows(tmp_path / run / "metrics.csv")]
        for run in ("killed", "whole")
    ]
    assert losses[0] == losses[1]
    # The first process alone prints and writes.
    text = (tmp_path / "whole.log").read_text()
    assert text.count("run folder: ") == 1
    assert text.count("epoch 4: train loss") == 1
