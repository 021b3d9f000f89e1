"""Runs jobs in several processes of one world; started as a process of its own.

Usage: python workers.py JOBS.json

JOBS is a list of {"processes": 2, "call": "module:function", "arguments": {...}}, done in turn. In
every process the function gets the arguments and may return a JSON value; a line with the list of
all of them is printed for each job. A job with "dies": true must fail. One process imports torch
once and forks all others from there, with the environment variables that torchrun would set.
"""

import importlib
import json
import os
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def work(job: dict[str, Any], rank: int, port: int, answer: Path) -> None:
    if job["processes"] > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(job["processes"]),
            LOCAL_WORLD_SIZE=str(job["processes"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    module, _, function = job["call"].partition(":")
    value = getattr(importlib.import_module(module), function)(**job["arguments"])
    answer.write_text(json.dumps(value))


def train(**options: Any) -> None:
    """A job: trains as the options of `TrainConfig` say."""
    from ca3d.training import TrainConfig
    from ca3d.training import train as run

    run(TrainConfig(**options))


def main() -> None:
    import torch

    from ca3d.training import loop  # noqa: F401 - imported before forking

    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        port = free_port()
        with tempfile.TemporaryDirectory() as folder:
            answers = [Path(folder, f"{rank}.json") for rank in range(job["processes"])]
            children = []
            for rank, answer in enumerate(answers):
                child = os.fork()
                if child == 0:
                    status = 1
                    try:
                        work(job, rank, port, answer)
                        status = 0
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        sys.stdout.flush()
                        os._exit(status)
                children.append(child)
            failed = [os.waitpid(child, 0)[1] for child in children]
            if bool(any(failed)) != bool(job.get("dies")):
                sys.exit(f"{job} ended with {failed}")
            if any(failed):
                continue
            print("answers:", json.dumps([json.loads(a.read_text()) for a in answers]), flush=True)


if __name__ == "__main__":
    main()
