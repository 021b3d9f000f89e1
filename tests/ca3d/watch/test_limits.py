import pytest

from ca3d.watch.limits import apply_limits


def test_bad_limit():
    with pytest.raises(ValueError, match="memory_mb must be at least 1"):
        apply_limits(0)
