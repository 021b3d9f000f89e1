"""Reading processes: when they end."""

import subprocess
import sys

# The reader is killed before torch's workers begin to watch it.
ORPHANS = """
import os, signal, time
from torch.utils.data import DataLoader
from ca3d.data.workers import start_worker

reader = os.getpid()

def start(worker):
    while os.getppid() == reader:
        time.sleep(0.01)
    start_worker(worker)

batches = iter(DataLoader([1, 2], num_workers=2, worker_init_fn=start))
print("reading", flush=True)
os.kill(reader, signal.SIGKILL)
"""


def test_workers_do_not_outlive_a_reader_that_is_killed_at_once() -> None:
    # The pipes stay open as long as a worker lives.
    done = subprocess.run(
        [sys.executable, "-c", ORPHANS], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "reading\n"
    assert done.returncode < 0
