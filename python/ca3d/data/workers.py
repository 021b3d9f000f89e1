"""Reading processes that outlive a signal to the whole job, but never their reader, and that leave
the cores to its computing."""

import multiprocessing
import os
import signal
import threading
import time

# A trainer finishes its batch before it saves and ends its workers: seconds, with most models.
_GRACE_SECONDS = 60
_WATCH_SECONDS = 2
# Where the reader computes on the same cores. Otherwise its threads wait for whichever of them a
# worker has put aside. Epochs of a small CA3D with two workers that decode videos on two cores
# (Intel Xeon, 2026-11-28): 16 and 20 s instead of 22 with threads that spin, 31 s instead of 36
# with threads that sleep beside two busy programs. With 10 such programs starve the workers: 67 s.
_NICENESS = 5


def start_worker(worker: int, *, yields: bool = False) -> None:
    """Leaves it to the process that reads from this one when to end.

    `timeout`, systemd and containers send SIGTERM to all processes of a job at once, a terminal
    SIGINT. A worker that died of it would take the batch along that its reader waits for before it
    saves. Who hasn't been ended a minute later ends by itself: nobody waits for it for ever.

    A reader that is killed can't end its workers. torch's own watch notices that, unless the reader
    died before the watch began: such a worker would stay for ever.

    Args:
        worker: Number of the worker; for `DataLoader(worker_init_fn=...)`.
        yields: Whether other processes come first on a busy core.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> list(DataLoader([1, 2], batch_size=None, num_workers=1, worker_init_fn=start_worker))
        [1, 2]
    """
    if yields:
        os.nice(_NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_SECONDS))
    reader = multiprocessing.parent_process()
    assert reader is not None
    threading.Thread(target=_end_with, args=(reader.pid,), daemon=True).start()


def _end_with(reader: int) -> None:
    while os.getppid() == reader:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
