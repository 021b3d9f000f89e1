"""How the Triton kernels cut clips into tiles of rows. Needs no triton."""

from typing import NamedTuple

from ca3d_kernels.backends import UnsupportedInputError
from ca3d_kernels.local_attention.op import Options


class Tile(NamedTuple):
    """How a launch cuts the problem; see `triton_kernels` and `triton_rolling_kernels`.

    Attributes:
        rows: of a tile.
        frames: of each sequence in a tile.
        table_heads: sequences of a position, with a key table, else 0.
        rolling: whether clips are longer than a tile, and a program goes along one sequence, or
            with a key table along one position.
    """

    rows: int
    frames: int
    table_heads: int
    rolling: bool = False

    def programs(self, positions: int, heads: int) -> int:
        """Tiles that hold whole clips of all positions and heads, or clips that are longer."""
        places = 1 if self.rolling else self.rows // self.frames
        if self.table_heads:
            return -(-positions // (1 if self.rolling else places // self.table_heads))
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
        largest: rows of the largest tile, or of two rolling ones; a power of two.

    Raises:
        UnsupportedInputError: clips are longer than a tile, and a window reaches further than two.

    Example:
        >>> tile(4, 8, Options(), largest=32)
        Tile(rows=16, frames=8, table_heads=0, rolling=False)
        >>> tile(4, 80, Options(), largest=64)
        Tile(rows=32, frames=32, table_heads=0, rolling=True)
    """
    table_heads = power_of_two(heads) if options.key_table else 0
    sequences = max(table_heads, 1)
    whole = power_of_two(frames)
    if sequences * whole <= largest:
        return Tile(max(16, sequences * whole), whole, table_heads)
    rows = max(16, largest // 2)
    span = rows // sequences
    # A clip with dilation is as many clips, without.
    window = sum(reach(options)) // options.dilation
    if span < window or span == 0:
        per_head = f" for each of {heads} heads of a key table" if options.key_table else ""
        raise UnsupportedInputError(
            f"{frames} frames are more than the {largest // sequences} that a tile holds"
            f"{per_head}, and in longer clips a window reaches at most {span} frames, not "
            f"{window} as with kernel_size {options.kernel_size} and edge {options.edge!r}"
        )
    return Tile(rows, span, table_heads, rolling=True)
