"""How the Triton kernels cut clips into tiles of rows. Needs no triton."""

from typing import NamedTuple

from ca3d_kernels.backends import UnsupportedInputError
from ca3d_kernels.local_attention.op import Options

# Tiles that a program goes along. Where another takes over, each reads a tile of the other's too.
STRETCH = 32


class Tile(NamedTuple):
    """How a launch cuts the problem; see `triton_kernels` and `triton_rolling_kernels`.

    Attributes:
        rows: of a tile.
        frames: of each sequence in a tile.
        table_heads: sequences of a position, with a key table, else 0.
        classes: 0 where a tile holds whole clips. Otherwise a program goes along one sequence (with
            a key table along all of one position), and these are as many clips without dilation as
            a clip has dilation.
        stretches: programs that follow each other along a clip.
        back: frames of such a clip that a window reaches back.
    """

    rows: int
    frames: int
    table_heads: int
    classes: int = 0
    stretches: int = 1
    back: int = 0

    @property
    def rolling(self) -> bool:
        """Whether clips are longer than a tile."""
        return self.classes > 0

    def programs(self, positions: int, heads: int) -> int:
        """Programs for all positions and heads."""
        if self.rolling:
            clips = positions if self.table_heads else positions * heads
            return clips * self.classes * self.stretches
        places = self.rows // self.frames
        if self.table_heads:
            return -(-positions // (places // self.table_heads))
        return -(-positions * heads // places)


def power_of_two(least: int) -> int:
    """The smallest power of two that isn't below a positive number.

    Example:
        >>> power_of_two(5), power_of_two(8)
        (8, 8)
    """
    return 1 << (least - 1).bit_length()


def reach(options: Options) -> tuple[int, int]:
    """How many frames before and after a frame its window can reach.

    Example:
        >>> reach(Options(kernel_size=5, dilation=2)), reach(Options(edge="shift"))
        ((4, 4), (4, 4))
    """
    window = (options.kernel_size - 1) * options.dilation
    if options.edge == "shift" and not options.causal:
        return window, window
    return before(options) * options.dilation, window - before(options) * options.dilation


def before(options: Options) -> int:
    """How many slots of a window lie before its query's frame.

    Example:
        >>> before(Options(kernel_size=5)), before(Options(kernel_size=5, causal=True))
        (2, 4)
    """
    return options.kernel_size - 1 if options.causal else options.kernel_size // 2


def tile(heads: int, frames: int, options: Options, *, largest: int) -> Tile:
    """Cuts a problem into tiles.

    Args:
        heads, frames: of the operands.
        options: of the op.
        largest: rows of the largest tile that holds whole clips; a power of two, at least 16. One
            that a program goes along has 16, or more up to half of these if windows need them.

    Raises:
        UnsupportedInputError: clips are longer than a tile, and a window reaches further than it.

    Example:
        >>> tile(4, 8, Options(), largest=32)
        Tile(rows=16, frames=8, table_heads=0, classes=0, stretches=1, back=0)
        >>> tile(4, 80, Options(dilation=3), largest=64)
        Tile(rows=16, frames=16, table_heads=0, classes=3, stretches=1, back=2)
    """
    table_heads = power_of_two(heads) if options.key_table else 0
    sequences = max(table_heads, 1)
    whole = power_of_two(frames)
    if sequences * whole <= largest:
        return Tile(max(16, sequences * whole), whole, table_heads)
    classes = min(options.dilation, frames)
    length = -(-frames // classes)
    back, ahead = (min(x // options.dilation, length - 1) for x in reach(options))
    rows = 16
    while rows // sequences < back + ahead and rows < largest // 2:
        rows *= 2
    span = rows // sequences
    if span == 0 or span < back + ahead:
        per_head = f" for each of {heads} heads of a key table" if options.key_table else ""
        raise UnsupportedInputError(
            f"{frames} frames are more than the {largest // sequences} that a tile holds"
            f"{per_head}, and in longer clips a window reaches at most {span} frames, not "
            f"{back + ahead} as with kernel_size {options.kernel_size} and edge {options.edge!r}"
        )
    return Tile(rows, span, table_heads, classes, -(-length // (span * STRETCH)), back)
