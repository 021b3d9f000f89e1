"""The disjoint ranges from which training, validation and test clips draw what varies."""

from collections.abc import Mapping

import numpy as np

SPLITS = ("train", "val", "test")
Intervals = tuple[tuple[float, float], ...]


def _every(step: float, count: int, low: float, high: float) -> Intervals:
    return tuple((step * k + low, step * k + high) for k in range(count))


# Where the camera stands: `side` within 60 degrees of the right side that the performer had at the
# recording's begin, so that nearly all travel to the right; `all` anywhere around: much harder.
YAW: Mapping[str, Mapping[str, Intervals]] = {
    "side": {
        "train": _every(40.0, 3, -60.0, -36.0),
        "val": _every(40.0, 3, -33.0, -31.0),
        "test": _every(40.0, 3, -28.0, -22.0),
    },
    "all": {
        "train": _every(40.0, 9, -60.0, -36.0),
        "val": _every(40.0, 9, -33.0, -31.0),
        "test": _every(40.0, 9, -28.0, -22.0),
    },
}
# All splits cover the whole range of a quantity, in interleaved parts with gaps between them: test
# clips show unseen values between seen ones. Angles and hues in degrees; the rest are factors.
INTERVALS: Mapping[str, Mapping[str, Intervals]] = {
    "tempo": {
        "train": ((0.80, 0.94), (1.06, 1.25)),
        "val": ((0.955, 0.975),),
        "test": ((0.985, 1.045),),
    },
    "leg_length": {
        "train": ((0.88, 0.96), (1.04, 1.12)),
        "val": ((0.965, 0.980),),
        "test": ((0.985, 1.030),),
    },
    "arm_length": {
        "train": ((0.88, 0.96), (1.04, 1.12)),
        "val": ((0.965, 0.980),),
        "test": ((0.985, 1.030),),
    },
    "build": {
        "train": ((0.80, 0.98), (1.10, 1.30)),
        "val": ((0.990, 1.020),),
        "test": ((1.030, 1.090),),
    },
    "background_hue": {
        "train": _every(60.0, 6, 0.0, 36.0),
        "val": _every(60.0, 6, 39.0, 45.0),
        "test": _every(60.0, 6, 48.0, 57.0),
    },
    "background_texture": {
        "train": ((0, 1_000_000),),
        "val": ((1_000_000, 2_000_000),),
        "test": ((2_000_000, 3_000_000),),
    },
}


def draw(
    rng: np.random.Generator,
    quantity: str,
    split: str,
    table: Mapping[str, Mapping[str, Intervals]] = INTERVALS,
) -> float:
    """A value of a quantity, uniform over the split's intervals.

    Args:
        rng: source of randomness.
        quantity: a key of the table.
        split: `"train"`, `"val"` or `"test"`.
        table: quantity -> split -> half-open intervals.

    Returns:
        A number inside one of the intervals.

    Example:
        >>> 0.985 <= draw(np.random.default_rng(0), "tempo", "test") < 1.045
        True
    """
    intervals = np.asarray(table[quantity][split], dtype=np.float64)
    ends = np.cumsum(intervals[:, 1] - intervals[:, 0])
    position = rng.uniform(0.0, ends[-1])
    part = min(int(np.searchsorted(ends, position, side="right")), len(ends) - 1)
    return float(intervals[part, 1] - (ends[part] - position))
