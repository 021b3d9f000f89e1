"""The points where the paper's words and the published code differ, as named choices."""

from dataclasses import dataclass

__all__ = ["Choices", "head_order", "resolve"]


@dataclass(frozen=True)
class Choices:
    """What a preset stands for. Each field is also an option of `ca3d.models.CA3D`.

    Attributes:
        pool: ``"paper"`` (time is pooled before a block that has a temporal half) or
            ``"published"`` (between that block's halves).
        edge: the attention window at the clip's ends: ``"truncate"``, ``"zero"`` or ``"shift"``.
        scale: ``"sqrt"`` multiplies q·k by head_dim**-0.5, ``"linear"`` by 1 / head_dim.
        keys: ``"own"`` (a query meets the keys of its own head) or ``"published"`` (those of other
            heads too, by the published code's indexing).

    Example:
        >>> Choices().pool
        'paper'
    """

    pool: str = "paper"
    edge: str = "truncate"
    scale: str = "sqrt"
    keys: str = "own"


_ALLOWED = {
    "pool": ("paper", "published"),
    "edge": ("truncate", "zero", "shift"),
    "scale": ("sqrt", "linear"),
    "keys": ("own", "published"),
}
_PRESETS = {None: Choices(), "published": Choices("published", "zero", "linear", "published")}


def resolve(preset: str | None, **overrides: str | None) -> Choices:
    """Fills in the choices that the user left to the preset.

    Args:
        preset: None for the package's defaults, or ``"published"`` for the published code.
        **overrides: fields of `Choices`; None leaves one to the preset.

    Returns:
        The choices.

    Raises:
        ValueError: an unknown preset or value.

    Example:
        >>> resolve("published", pool="paper")
        Choices(pool='paper', edge='zero', scale='linear', keys='published')
    """
    if preset not in _PRESETS:
        raise ValueError(f"preset must be None or 'published', got {preset!r}")
    chosen = {}
    for name, allowed in _ALLOWED.items():
        value = overrides.get(name)
        value = getattr(_PRESETS[preset], name) if value is None else value
        if value not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}"
            )
        chosen[name] = value
    return Choices(**chosen)


def head_order(previous_heads: int, heads: int) -> list[int]:
    """Published number of the attention head that sits in each of our places.

    A published channel c belongs to head ``c mod heads``; ours are contiguous groups. Where a
    grouped convolution with fewer heads delivers the channels of an attention with more, the
    attention's heads stand in our order as they do in the groups that contain them.

    Args:
        previous_heads: groups G of the convolutions in front of the attention.
        heads: attention heads H, a multiple of G.

    Returns:
        The published head in place 0, 1, ...

    Raises:
        ValueError: `heads` is no multiple of `previous_heads`.

    Example:
        >>> head_order(4, 8)
        [0, 4, 1, 5, 2, 6, 3, 7]
    """
    if heads % previous_heads:
        raise ValueError(
            f"published keys need temporal heads ({heads}) that are a multiple of the spatial "
            f"heads in front of them ({previous_heads})"
        )
    return [
        group + previous_heads * member
        for group in range(previous_heads)
        for member in range(heads // previous_heads)
    ]
