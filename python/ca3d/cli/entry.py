"""Runs a command and reports errors in one line."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from ca3d.cli.parser import make_parser, parse
from ca3d.cli.table import INSTALL, load
from ca3d.errors import UserError
from ca3d.watch.credentials import redact

# Commands that train beside processes that read videos.
_TRAINING = ("train", "demo", "compare", "study")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `ca3d` command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0 fine, 1 an error of the user's, 2 no command, 128 + the signal that
        stopped it. Wrong usage and `--help` leave by `SystemExit` (2 and 0), as argparse has it.

    Example:
        >>> main(["info", "missing.safetensors"])
        1
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    name = "ca3d"
    previous = _catch_termination()
    try:
        if not arguments:
            make_parser("-").print_help()
            return 2
        if arguments[0] in _TRAINING and "torch" not in sys.modules:
            # At every layer OpenMP's threads wait for the slowest: they must not spin meanwhile on
            # the cores that reading processes need. It is read when torch is loaded.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        command, config = parse(arguments)
        name = f"ca3d {command.name}"
        run: Callable[[Any], int | None] = load(command.run)
        return run(config) or 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has gone; Python would complain once more at exit.
        sys.stdout = None
        return 141
    except Exception as error:
        if debug:
            _print_traceback()
        return _report(name, error, debug)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _print_traceback() -> None:
    # A camera's address may be in any of its lines.
    print(redact(traceback.format_exc()), end="", file=sys.stderr)


def _report(name: str, error: Exception, debug: bool) -> int:
    """Prints an error in one line and returns the exit code."""
    from_signal = getattr(error, "exit_code", None)
    if from_signal is not None:
        print(f"{name}: {error}", file=sys.stderr)
        return int(from_signal)
    if isinstance(error, UserError):
        message = str(error)
    elif isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("ca3d"):
        message = f"the package {error.name} is missing; run: {INSTALL}"
    elif isinstance(error, MemoryError) or "allocate memory" in str(error):
        message = "out of memory; a smaller --batch-size or --size needs less"
    else:
        if not debug:
            _print_traceback()
        message = f"this is a bug ({type(error).__name__}); please report the lines above"
    print(f"{name}: error: {redact(' '.join(message.splitlines()))}", file=sys.stderr)
    return 1


def _catch_termination() -> Any:
    def stop(number: int, frame: FrameType | None) -> None:
        from ca3d.training.interrupt import StoppedError

        raise StoppedError(number)

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:  # Not the main thread.
        return None
