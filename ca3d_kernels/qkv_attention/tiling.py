"""How the Triton kernels cut a problem into tiles, and which they can't take. Needs no triton."""

from typing import NamedTuple

import torch
from torch import Tensor

from ca3d_kernels.backends import UnsupportedInputError
from ca3d_kernels.local_attention.op import Options
from ca3d_kernels.local_attention.tiling import power_of_two, reach

# Rows of the largest tile: what fits into registers.
_FORWARD_ROWS = 32
_BACKWARD_ROWS = 16
# With a key table: rows of a position, and elements of a matrix of all heads' weights.
_TABLE_ROWS = 32
_TABLE_WEIGHTS = 8 * 64 * 64


class Tile(NamedTuple):
    """How a launch cuts the clips of one head; see `triton_kernels`.

    Attributes:
        rows: of a tile.
        frames: of each clip in a tile, the halo included.
        owned: frames of each clip that a tile writes.
        front: frames of the halo before them.
    """

    rows: int
    frames: int
    owned: int
    front: int

    def blocks(self, frames: int) -> int:
        """Tiles that a clip of so many frames is cut into."""
        return -(-frames // self.owned)

    def groups(self, positions: int) -> int:
        """Tiles next to each other, for all positions."""
        return -(-positions // (self.rows // self.frames))


class TableTile(NamedTuple):
    """A tile of the kernels for a key table: all heads of some positions.

    Attributes:
        heads, frames: rounded up to powers of two.
        places: positions.
        num_warps: of 32 threads.
    """

    heads: int
    frames: int
    places: int
    num_warps: int


def tile(frames: int, options: Options, *, backward: bool) -> Tile:
    """Cuts the clips of one head into tiles.

    Args:
        frames: of a clip.
        options: of the attention.
        backward: whether every key of a tile's own needs all queries that it meets, and these
            queries all of their keys.

    Raises:
        UnsupportedInputError: a block of a long clip has no room beside its halo.

    Example:
        >>> tile(8, Options(), backward=False)
        Tile(rows=32, frames=8, owned=8, front=0)
    """
    rows = _BACKWARD_ROWS if backward else _FORWARD_ROWS
    whole = power_of_two(frames)
    if whole <= rows:
        return Tile(rows, whole, whole, 0)
    back, ahead = reach(options)
    if backward:
        back = ahead = back + ahead
    if rows <= back + ahead:
        raise UnsupportedInputError(
            f"{frames} frames are more than the {rows} that a tile holds, and the "
            f"{'backward' if backward else 'forward'} pass needs {back + ahead} of these beside "
            f"its own, with kernel_size {options.kernel_size} and dilation {options.dilation}"
        )
    return Tile(rows, rows, rows - back - ahead, back)


def table_tile(heads: int, frames: int) -> TableTile:
    """Cuts a problem with a key table into tiles: one warp works on one position.

    Example:
        >>> table_tile(4, 8)
        TableTile(heads=4, frames=8, places=4, num_warps=4)
    """
    rounded = power_of_two(heads)
    warps = min(8, max(4, rounded))
    return TableTile(rounded, power_of_two(frames), warps, warps)


def limit(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: Options, *, backward: bool
) -> str | None:
    """Why the fused kernels can't take an input, or None when they can.

    Args:
        x: (B, T, N, C).
        weight: (heads, 3 * head_dim, head_dim).
        bias: (heads, 3 * head_dim), (heads, T, 3 * head_dim) or None.
        options: of the attention.
        backward: whether the backward pass is asked about, instead of the forward pass.

    Example:
        >>> x = torch.empty(1, 40, 9, 32, dtype=torch.float32)
        >>> limit(x, torch.empty(2, 48, 16), None, Options(), backward=False)
        'dtype torch.float32 is not float16 or bfloat16'
    """
    heads, _, head_dim = weight.shape
    frames, positions = x.shape[1], x.shape[0] * x.shape[2]
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {x.dtype} is not float16 or bfloat16"
    if head_dim not in (16, 32, 64):
        return f"head_dim {head_dim} is not 16, 32 or 64"
    if backward and bias is not None and bias.dim() == 3:
        return "there is no backward kernel for a bias of every frame"
    if options.key_table:
        return _table_limit(heads, frames, head_dim, positions, options)
    try:
        cut = tile(frames, options, backward=backward)
    except UnsupportedInputError as reason:
        return str(reason)
    if cut.blocks(frames) * positions >= 2**31 - 64:
        return f"{positions} positions are too many"
    return None


def _table_limit(
    heads: int, frames: int, head_dim: int, positions: int, options: Options
) -> str | None:
    cut = table_tile(heads, frames)
    if options.kernel_size > 127:
        return f"kernel_size {options.kernel_size} is above 127"
    if cut.heads * cut.frames > _TABLE_ROWS:
        return (
            f"{heads} heads of {frames} frames, in powers of two, are more than the {_TABLE_ROWS} "
            "rows of a position that a key table can mix"
        )
    if cut.heads * head_dim**2 > _TABLE_WEIGHTS:
        return f"a key table of {heads} heads of head_dim {head_dim} needs too much shared memory"
    if positions * frames >= 2**31 - 64:
        return f"{positions} positions of {frames} frames are too many"
    return None
