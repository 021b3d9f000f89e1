"""What one run of a grid is, and what it is known by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Cell"]


@dataclass(frozen=True)
class Cell:
    """One training run of a grid.

    Args:
        model: Name in `ca3d.models`.
        regime: Name in `ca3d.precision`, or "native-float16".
        seed: Of weights, order, dropout and stochastic rounding.
        data: What `ca3d.experiments.clips.load` makes clips from, as plain values.
        model_options: Options of the model.
        regime_options: Options of the regime: constant, loss_factor, rounding.
        recipe: Fields of `ca3d.training.TrainConfig` that differ from its defaults.
        part: What the run is for, such as "tune"; rows are told apart by it.
        variant: Name of the model's options, for people: two cells that differ in it alone are the
            same run.
        observe: Steps between two looks at the tensors (`ca3d.experiments.observer`); 0 for none.

    Example:
        >>> from dataclasses import replace
        >>> cell = Cell("ca3d_tiny", "float32", 0, {"name": "motion-order"})
        >>> cell.key[:21]
        'ca3d_tiny-float32-s0-'
        >>> cell.key == Cell.of(cell.to_dict()).key == replace(cell, variant="small").key
        True
    """

    model: str
    regime: str
    seed: int
    data: Mapping[str, Any]
    model_options: Mapping[str, Any] = field(default_factory=dict)
    regime_options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    part: str = "main"
    variant: str = ""
    observe: int = 0

    @property
    def key(self) -> str:
        """The cell's name: the same for the same values, in any process and Python version."""
        text = json.dumps({**self.to_dict(), "variant": ""}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return f"{self.model}-{self.regime}-s{self.seed}-{digest}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the cell as plain values for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Cell:
        """Makes a cell of what `to_dict` returned.

        Args:
            values: Values by name.
        """
        return cls(**values)

    def matches(self, **values: Any) -> bool:
        """Whether all named fields have these values.

        Example:
            >>> Cell("m", "float32", 3, {}).matches(seed=3, part="main")
            True
        """
        return all(getattr(self, name) == value for name, value in values.items())
