"""How the Triton kernels cut clips into tiles of rows. Needs no triton."""

from typing import NamedTuple

from ca3d_kernels.backends import UnsupportedInputError
from ca3d_kernels.local_attention.op import Options


class Tile(NamedTuple):
    """How a launch cuts the problem; see `local_attention.triton_kernels`.

    Attributes:
        rows: of a tile.
        frames: of each sequence in a tile, the halo included.
        owned: frames of each sequence that a tile writes.
        front: frames of the halo before them.
        table_heads: sequences of a position, with a key table, else 0.
        met_front, met_back: frames before and after a tile's own whose queries meet its own keys;
            0 in a forward pass, which needs its own queries alone.
    """

    rows: int
    frames: int
    owned: int
    front: int
    table_heads: int
    met_front: int = 0
    met_back: int = 0

    def blocks(self, frames: int) -> int:
        """Tiles that a clip of so many frames is cut into."""
        return -(-frames // self.owned)

    def groups(self, positions: int, heads: int) -> int:
        """Tiles next to each other, for all positions and heads."""
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


def _reach(options: Options) -> tuple[int, int]:
    """How many frames before and after a frame its window can reach."""
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


def tile(heads: int, frames: int, options: Options, *, largest: int, backward: bool) -> Tile:
    """Cuts a problem into tiles.

    Args:
        heads, frames: of the operands.
        options: of the op.
        largest: rows of the largest tile; a power of two.
        backward: whether every key of a tile's own needs all queries that it meets, and these
            queries all of their keys.

    Raises:
        UnsupportedInputError: a block of a long clip has no room beside its halo.

    Example:
        >>> tile(4, 8, Options(), largest=32, backward=False)
        Tile(rows=16, frames=8, owned=8, front=0, table_heads=0, met_front=0, met_back=0)
    """
    table_heads = power_of_two(heads) if options.key_table else 0
    sequences = max(table_heads, 1)
    whole = power_of_two(frames)
    if sequences * whole <= largest:
        rows = max(16, sequences * whole)
        return Tile(rows, whole, whole, 0, table_heads)
    back, ahead = _reach(options)
    met_front, met_back = (ahead, back) if backward else (0, 0)
    if backward:
        back = ahead = back + ahead
    span = largest // sequences
    if span <= back + ahead:
        per_head = f" for each of {heads} heads of a key table" if options.key_table else ""
        raise UnsupportedInputError(
            f"{frames} frames are more than the {span} that a tile holds{per_head}, and the "
            f"{'backward' if backward else 'forward'} pass needs {back + ahead} of these beside "
            f"its own, with kernel_size {options.kernel_size} and dilation {options.dilation}"
        )
    return Tile(largest, span, span - back - ahead, back, table_heads, met_front, met_back)
