"""Runs a training job that is killed again and again; started as a process of its own.

Usage: python killing.py CONFIG.json PLAN.json

PLAN is a list of the moments at which the run is killed, in turn, and then resumed:
  ["seconds", 0.3]        so long after it began to train
  ["before", n]           just before the n-th file of this life is renamed into place
  ["after", n]            just after it
One process imports torch once and forks every life from there, which saves seconds a life.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def live(config: dict[str, Any], moment: list[Any] | None) -> None:
    """Trains, in a forked process, until the moment comes."""
    from ca3d import files
    from ca3d.training import TrainConfig, loop, train

    if moment is not None and moment[0] == "seconds":
        original = loop.Trainer.run

        def run(self: Any, state: Any = None) -> Any:
            def kill() -> None:
                time.sleep(moment[1])
                os.kill(os.getpid(), signal.SIGKILL)

            threading.Thread(target=kill, daemon=True).start()
            return original(self, state)

        loop.Trainer.run = run  # type: ignore[method-assign]
    elif moment is not None:
        count = 0
        replace: Callable[..., None] = os.replace

        def counted(source: Any, target: Any) -> None:
            nonlocal count
            count += 1
            if count == moment[1] and moment[0] == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if count == moment[1] and moment[0] == "after":
                os.kill(os.getpid(), signal.SIGKILL)

        files.os.replace = counted  # type: ignore[assignment]
    train(TrainConfig(**{**config, "resume": "auto"}))


def main() -> None:
    import torch

    from ca3d.training import loop  # noqa: F401 - imported before forking

    torch.set_num_threads(1)
    config = json.loads(Path(sys.argv[1]).read_text())
    plan = [*json.loads(Path(sys.argv[2]).read_text()), None]
    killed = 0
    for moment in plan:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                live(config, moment)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, result = os.waitpid(child, 0)
        if os.WIFSIGNALED(result):
            assert os.WTERMSIG(result) == signal.SIGKILL
            killed += 1
        elif os.WEXITSTATUS(result):
            sys.exit(f"a life ended with {os.WEXITSTATUS(result)} at {moment}")
    print(json.dumps({"killed": killed}))


if __name__ == "__main__":
    main()
