"""Writing files so that a crash or a full disk never leaves half of one, and none is lost."""

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from ca3d.errors import UserError

__all__ = ["check_free", "write_atomically"]


def check_free(*paths: str | Path, force: bool, flag: str = "") -> None:
    """Raises `UserError` for a file that is there and must not be replaced.

    Args:
        *paths: The files that are going to be written.
        force: What the user's `--force` says.
        flag: The option that names them, such as "--json".

    Raises:
        ca3d.errors.UserError: One of them is there, and `force` is not set.

    Example:
        >>> check_free("/dev/null", "/nothing/here", force=False, flag="--json")
        Traceback (most recent call last):
        ca3d.errors.UserError: --json /dev/null: exists already; --force replaces it
        >>> check_free("/dev/null", force=True)
    """
    there = [str(path) for path in paths if Path(path).exists()]
    if there and not force:
        them = "it" if len(there) == 1 else "them"
        named = f"{flag} {', '.join(there)}".strip()
        verb = "exists" if len(there) == 1 else "exist"
        raise UserError(f"{named}: {verb} already; --force replaces {them}")


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name in the same folder and then renames it.

    At any moment, `path` holds the old content or the new one, in full. When writing fails, the
    temporary file is removed and the old content stays.

    Args:
        path: the file.
        write: called with the temporary path; must create that file.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(f"{folder}/a.txt", lambda path: path.write_text("text"))
        ...     [path.name for path in Path(folder).iterdir()]
        ['a.txt']
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    # The rename itself must reach the disk, too; some file systems can't sync a folder.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
