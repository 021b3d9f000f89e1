"""The decoding process, seen from the program that watches."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO

from ca3d.watch.credentials import PASSWORD_VARIABLE, USER_VARIABLE
from ca3d.watch.messages import Frame, Notice, read_messages
from ca3d.watch.request import Request

_LOG_BYTES = 4000
# Python, its libraries and the opening of a file, on a slow and busy machine.
_START_SECONDS = 60.0


class DecoderProcess:
    """Runs `ca3d.watch.decoder` on one request, and hands on what it says.

    A fresh interpreter: nothing of this process, neither threads nor memory, is in it. It is killed
    when it stays silent for too long, and it ends when this process does.

    Args:
        request: What to read.
        silence: Seconds without a message after which it is killed.

    Example:
        >>> request = Request("file", str(video_file), resize=32, size=32)
        >>> said = []
        >>> DecoderProcess(request).run(said.append).kind, len(said) > 3
        ('end', True)
    """

    def __init__(self, request: Request, silence: float = 20.0) -> None:
        self.request, self.silence = request, silence
        self._process: subprocess.Popen[bytes] | None = None
        self._log = b""
        self._heard = 0.0
        self._hung = False
        self._stopped = threading.Event()

    @property
    def pid(self) -> int | None:
        """Number of the running process, None when there is none."""
        return self._process.pid if self._process is not None else None

    def run(self, hand_on: Callable[[Frame | Notice], None]) -> Notice:
        """Reads the source to its end.

        Args:
            hand_on: Called with every message but the last.

        Returns:
            The last message; of kind `lost` when the process died without one.
        """
        self._process = self._start()
        if self._stopped.is_set():  # While it was being started.
            self.stop()
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._heard = time.monotonic() + _START_SECONDS
        log = threading.Thread(target=self._read_log, args=(self._process.stderr,), daemon=True)
        log.start()
        threading.Thread(target=self._guard, args=(self._process,), daemon=True).start()
        last: Notice | None = None
        try:
            for message in read_messages(self._process.stdout):  # type: ignore[arg-type]
                self._heard = max(self._heard, time.monotonic())
                if isinstance(message, Notice) and message.kind == "opened":
                    self._heard = time.monotonic()
                if isinstance(message, Notice) and message.last:
                    last = message
                    break
                # Handing on takes its time when the model does: that is no silence.
                self._heard, heard = math.inf, self._heard
                hand_on(message)
                self._heard = max(heard, time.monotonic())
        except ValueError as error:
            last = Notice("lost", f"{self.request.name}: {error}")
        finally:
            self.stop()
        log.join(timeout=1)
        return last or self._obituary(self._process)

    def stop(self) -> None:
        """Ends the process."""
        self._stopped.set()
        process = self._process
        if process is not None:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        for variable in (USER_VARIABLE, PASSWORD_VARIABLE):
            environment.pop(variable, None)
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[variable] = "1"
        process = subprocess.Popen(
            [sys.executable, "-m", "ca3d.watch.decoder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        assert process.stdin is not None
        # By a pipe: arguments and variables of a process can be seen by others.
        try:
            process.stdin.write(self.request.to_json().encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # It died at once: its exit status says more.
        return process

    def _read_log(self, stream: IO[bytes]) -> None:
        for line in stream:
            self._log = (self._log + line)[-_LOG_BYTES:]

    def _guard(self, process: subprocess.Popen[bytes]) -> None:
        while not self._stopped.wait(0.2):
            if time.monotonic() - self._heard > self.silence:
                self._hung = True
                process.kill()
                return

    def _obituary(self, process: subprocess.Popen[bytes]) -> Notice:
        name = self.request.name
        if self._hung:
            return Notice("lost", f"{name}: nothing came for {self.silence:g} s")
        status = process.returncode
        how = f"exit status {status}"
        if status < 0:
            how = f"killed by {signal.Signals(-status).name}"
        log = self._log.decode(errors="replace").strip().splitlines()
        reason = f": {self.request.redact(log[-1])}" if log else ""
        return Notice("lost", f"{name}: the decoder died ({how}){reason}")
