"""How the Triton kernel cuts a problem into tiles, and which it can't take. Needs no triton."""

import torch
from torch import Tensor

from ca3d_kernels.local_attention.op import Options
from ca3d_kernels.local_attention.tiling import power_of_two

# Rows of a tile: what fits into registers.
ROWS = 32


def frames_of_a_tile(frames: int) -> int:
    """Rows that a position takes in a tile.

    Example:
        >>> frames_of_a_tile(8), frames_of_a_tile(5)
        (8, 8)
    """
    return power_of_two(frames)


def tiles(positions: int, frames: int) -> int:
    """Tiles of one head.

    Example:
        >>> tiles(196, 8)
        49
    """
    return -(-positions * frames_of_a_tile(frames) // ROWS)


def limit(x: Tensor, qkv_weight: Tensor, options: Options) -> str | None:
    """Why the kernel can't take an input, or None when it can.

    Args:
        x: (B, T, N, C).
        qkv_weight: (heads, d, 3 * d).
        options: of the attention.

    Example:
        >>> x = torch.empty(1, 40, 9, 32, dtype=torch.float16)
        >>> limit(x, torch.empty(2, 16, 48), Options())
        '40 frames are more than the 32 that a tile holds'
    """
    head_dim, frames = qkv_weight.shape[1], x.shape[1]
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {x.dtype} is not float16 or bfloat16"
    if head_dim not in (16, 32, 64):
        return f"head_dim {head_dim} is not 16, 32 or 64"
    if options.key_table:
        return "a key table mixes heads, and a program holds one"
    if frames > ROWS:
        return f"{frames} frames are more than the {ROWS} that a tile holds"
    if x.shape[0] * x.shape[2] * frames_of_a_tile(frames) >= 2**31 - 64:
        return f"{x.shape[0] * x.shape[2]} positions are too many"
    return None
