"""Resume files: everything that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ca3d import files
from ca3d.errors import UserError

VERSION = 1


def write_file(path: str | Path, content: bytes | str) -> None:
    """Writes a file so that at any moment either the old or the new content is there in full.

    Args:
        path: The file; its folder must exist.
        content: Bytes, or text to be written as UTF-8.

    Raises:
        ca3d.errors.UserError: The disk is full or the folder can't be written to; the previous
            file is then intact.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_file(f"{folder}/a.txt", "text")
        ...     Path(f"{folder}/a.txt").read_text()
        'text'
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        files.write_atomically(path, lambda temporary: temporary.write_bytes(data))
    except OSError as error:
        intact = "; the previous file is intact" if Path(path).exists() else ""
        raise UserError(f"cannot write {path}: {error.strerror or error}{intact}") from error


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files of writes that were killed half-way.

    Example:
        >>> remove_leftovers(Path("."))
    """
    for left in folder.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def save_resume_state(path: str | Path, state: dict[str, Any]) -> None:
    """Writes a resume file, atomically.

    Args:
        path: Where to.
        state: Nested dicts, lists and tuples of tensors, numbers, strings and None.

    Raises:
        ca3d.errors.UserError: The disk is full or the folder can't be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_resume_state(f"{folder}/resume.pt", {"epoch": 3})
        ...     load_resume_state(f"{folder}/resume.pt")["epoch"]
        3
    """
    # torch's writer reports a full disk as an internal error, so it writes to memory first.
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **state}, buffer)
    write_file(path, buffer.getvalue())


def load_resume_state(path: str | Path) -> dict[str, Any]:
    """Reads a resume file; nothing in it is executed.

    Args:
        path: A file written by `save_resume_state`.

    Returns:
        The state, all tensors on the CPU.

    Raises:
        ca3d.errors.UserError: The file is missing, damaged, or of another version.

    Example:
        >>> load_resume_state("missing/resume.pt")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing/resume.pt: no such file
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is no resume file or is damaged") from error
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise UserError(f"{path} has resume format {version}, this version reads {VERSION}")
    return state


def random_state() -> dict[str, Any]:
    """Returns the state of Python's, numpy's and torch's random generators as plain values.

    Example:
        >>> state = random_state()
        >>> first = torch.rand(2)
        >>> set_random_state(state)
        >>> torch.equal(first, torch.rand(2))
        True
    """
    numpy_state = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state(legacy=True))
    name, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(keys.copy()), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` returned.

    Args:
        state: The three generators' states.

    Example:
        >>> set_random_state(random_state())
    """
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
