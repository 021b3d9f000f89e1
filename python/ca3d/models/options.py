"""Options of CA3D, checked when they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ca3d.models import presets

__all__ = ["CA3DOptions"]


@dataclasses.dataclass(frozen=True)
class CA3DOptions:
    """Everything that defines a CA3D model but its number of classes.

    Attributes:
        preset: None for the package's defaults, which follow the paper's words, or
            ``"published"`` for the published code; `pool`, `edge`, `scale` and `keys` override it.
        frames: frames T of a clip; the positional table fixes it. Each time pool halves an even
            number and leaves 1 as it is: with two pools 1, 2 or a multiple of 4.
        widths: channels of each block.
        spatial_depths: residual blocks in the column of each spatial half.
        temporal_depths: residual blocks in the column of each temporal half.
        spatial_heads: groups of each spatial half's convolutions.
        temporal_heads: attention heads of each block; 0 leaves the temporal half out.
        stem_kernel: side of the very first convolution's kernel.
        kernel_size: attention window in frames.
        dense_qkv: one projection across all heads instead of one for each head.
        dropout: probability of dropping a feature before the classifier.
        pool, edge, scale, keys: see `ca3d.models.presets.Choices`; None leaves them to the preset.
        norm_eps: added to the variance in every batch normalisation.
        norm_momentum: weight of a new batch in the running statistics.

    Raises:
        ValueError: an option out of its range, lists of differing length, or channels that the
            heads don't divide.
        TypeError: an option of the wrong type.

    Example:
        >>> CA3DOptions(widths=(8, 16, 32, 64)).widths
        (8, 16, 32, 64)
    """

    preset: str | None = None
    frames: int = 16
    widths: Sequence[int] = (64, 128, 256, 512)
    spatial_depths: Sequence[int] = (2, 2, 2, 2)
    temporal_depths: Sequence[int] = (0, 0, 2, 2)
    spatial_heads: Sequence[int] = (1, 1, 1, 4)
    temporal_heads: Sequence[int] = (0, 0, 4, 8)
    stem_kernel: int = 7
    kernel_size: int = 5
    dense_qkv: bool = False
    dropout: float = 0.5
    pool: str | None = None
    edge: str | None = None
    scale: str | None = None
    keys: str | None = None
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (
            ("widths", 1),
            ("spatial_depths", 0),
            ("temporal_depths", 0),
            ("spatial_heads", 1),
            ("temporal_heads", 0),
        ):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise TypeError(f"{name} must be a sequence of integers, got {values!r}")
            for value in values:
                _check_integer(f"every entry of {name}", value, least)
            if not values or len(values) != len(self.widths):
                raise ValueError(
                    f"{name} must have one entry for each block (widths has {len(self.widths)}), "
                    f"got {values!r}"
                )
            object.__setattr__(self, name, tuple(values))
        for name in ("frames", "stem_kernel", "kernel_size"):
            _check_integer(name, getattr(self, name), 1)
        if self.stem_kernel % 2 == 0:
            raise ValueError(f"stem_kernel must be odd, got {self.stem_kernel}")
        if not isinstance(self.dense_qkv, bool):
            raise TypeError(f"dense_qkv must be True or False, got {self.dense_qkv!r}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout must be a probability from 0 to 1, got {self.dropout!r}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps!r}")
        if not 0 <= self.norm_momentum <= 1:
            raise ValueError(f"norm_momentum must be from 0 to 1, got {self.norm_momentum!r}")
        self._check_heads()

    def _check_heads(self) -> None:
        choices = self.choices()
        entering = (3, *self.widths[:-1])
        for block, (before, width) in enumerate(zip(entering, self.widths, strict=True)):
            groups, heads = self.spatial_heads[block], self.temporal_heads[block]
            if before % groups or width % groups:
                raise ValueError(
                    f"spatial_heads[{block}] = {groups} must divide the channels that enter and "
                    f"leave block {block + 1} ({before} and {width})"
                )
            if heads and width % heads:
                raise ValueError(
                    f"temporal_heads[{block}] = {heads} must divide widths[{block}] = {width}"
                )
            if heads and choices.keys == "published":
                presets.head_order(groups, heads)

    def choices(self) -> presets.Choices:
        """The preset with its overrides applied.

        Example:
            >>> CA3DOptions(preset="published").choices().edge
            'zero'
        """
        return presets.resolve(
            self.preset, pool=self.pool, edge=self.edge, scale=self.scale, keys=self.keys
        )

    def as_dict(self) -> dict[str, Any]:
        """The options as keyword arguments that survive JSON unchanged.

        Example:
            >>> CA3DOptions().as_dict()["widths"]
            [64, 128, 256, 512]
        """
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
