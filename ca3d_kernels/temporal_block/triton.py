"""Launches the Triton kernel of the folded temporal half of a CAST block."""

from torch import Tensor

from ca3d_kernels import triton_launch
from ca3d_kernels.backends import UnsupportedInputError
from ca3d_kernels.local_attention.op import Options
from ca3d_kernels.local_attention.triton import PARTS, window
from ca3d_kernels.temporal_block import triton_kernels
from ca3d_kernels.temporal_block.op import Weights
from ca3d_kernels.temporal_block.tiling import ROWS, frames_of_a_tile, limit, tiles
from ca3d_kernels.triton_launch import Argument, Launch

# Few programs for each head, whose weights then stay near, but enough for a large GPU.
_PROGRAMS_PER_HEAD = 256


def launch(x: Tensor, weights: Weights, out: Tensor, options: Options) -> Launch:
    """The launch of the kernel; see `op.Kernels`.

    Raises:
        UnsupportedInputError: naming the limit of the kernel.

    Example:
        >>> import torch
        >>> x = torch.empty(2, 8, 196, 256, dtype=torch.float16, device="meta")
        >>> shapes = Weights.shapes(heads=4, head_dim=64, frames=8, convolutions=4).values()
        >>> weights = Weights(*(x.new_empty(shape) for shape in shapes))
        >>> launch(x, weights, x, Options()).programs
        392
    """
    if reason := limit(x, weights.qkv_weight, options):
        raise UnsupportedInputError(reason)
    if not triton_launch.has_tensor_cores(x.device):
        raise UnsupportedInputError("the GPU is older than sm_80")
    heads, head_dim, _ = weights.qkv_weight.shape
    batch, frames, inner, _ = x.shape
    count = tiles(batch * inner, frames)
    arguments: dict[str, Argument] = {
        f"{name}_{dim}": stride
        for name, image in (("x", x), ("out", out))
        for dim, stride in zip(("outer", "frame", "inner"), image.stride(), strict=False)
    }
    arguments |= {
        "positions": batch * inner,
        "heads": heads,
        "inner": inner,
        "frames": frames,
        "tiles": count,
        "convolutions": len(weights.column_weight),
        **window(options, frames, head_dim),
        "x": x,
        "out": out,
        **weights._asdict(),
    }
    constants = {
        "HEAD_DIM": head_dim,
        "ALIGNED": triton_launch.alignment(x, out),
        "PARTS": PARTS[x.dtype],
        "ROWS": ROWS,
        "FRAMES": frames_of_a_tile(frames),
    }
    function = triton_kernels.temporal_block_forward
    ordered = {name: arguments[name] for name in function.arg_names if name in arguments}
    programs = heads * min(count, _PROGRAMS_PER_HEAD)
    # Filters that are fetched ahead would take more shared memory than every GPU has.
    return Launch(function, programs, ordered, constants, 8, options={"num_stages": 1})


class TritonKernels:
    """Runs the Triton kernel; see `op.Kernels`."""

    def forward(self, x: Tensor, weights: Weights, out: Tensor, options: Options) -> None:
        """Writes the output into out."""
        triton_launch.run(launch(x, weights, out, options))
