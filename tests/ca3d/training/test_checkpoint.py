import errno
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ca3d.errors import UserError
from ca3d.training import checkpoint


def test_random_state_survives_the_file(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    np.random.standard_normal()  # Leaves the second of a pair of Gaussians behind.
    file = tmp_path / "resume.pt"
    checkpoint.save_resume_state(file, {"random": checkpoint.random_state()})
    first = random.random(), np.random.standard_normal(3).tolist(), torch.randn(3).tolist()
    checkpoint.set_random_state(checkpoint.load_resume_state(file)["random"])
    again = random.random(), np.random.standard_normal(3).tolist(), torch.randn(3).tolist()
    assert first == again


def test_full_disk_leaves_the_previous_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "resume.pt"
    checkpoint.save_resume_state(file, {"epoch": 1})

    def half(self: Path, data: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(UserError, match=r"resume.pt: No space left on device; the previous file"):
        checkpoint.save_resume_state(file, {"epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load_resume_state(file)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["resume.pt"]


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "resume.pt"
    checkpoint.save_resume_state(file, {"epoch": 1})
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_resume_state(file)
    torch.save({"version": 99}, file)
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load_resume_state(file)


def test_nothing_in_a_resume_file_is_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    file = tmp_path / "resume.pt"
    torch.save({"version": 1, "model": Evil()}, file)
    with pytest.raises(UserError):
        checkpoint.load_resume_state(file)
    assert not (tmp_path / "owned").exists()


def test_leftovers_of_killed_writes_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".resume.pt.123.abcd.tmp").write_bytes(b"half")
    (tmp_path / "resume.pt").write_bytes(b"whole")
    checkpoint.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["resume.pt"]


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    checkpoint.write_file(tmp_path / "a.txt", "text")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~mask
