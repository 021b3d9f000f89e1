"""Launches the Triton kernels of local temporal attention."""

import functools

import torch
from torch import Tensor

from ca3d_kernels import triton_launch
from ca3d_kernels.backends import UnsupportedInputError
from ca3d_kernels.local_attention import triton_kernels, triton_rolling_kernels
from ca3d_kernels.local_attention.op import Options
from ca3d_kernels.local_attention.tiling import STRETCH, before, power_of_two, tile
from ca3d_kernels.triton_launch import Launch

_CPU = torch.device("cpu")
# Numbers of the operand's dtype that hold a float32 weight; 1 multiplies in float32.
PARTS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


@functools.cache
def _counted(table: tuple[int, ...], heads: int, kernel_size: int, pinned: bool) -> Tensor:
    """The table that `key_counts` copies; kept, since a captured copy reads it at every replay."""
    pairs = torch.tensor(table, dtype=torch.int64, device="cpu").view(heads, kernel_size, 2)
    head = torch.arange(heads, device="cpu").unsqueeze(1).expand(heads, kernel_size)
    one = torch.ones((), dtype=torch.int32, device="cpu")
    counts = torch.zeros(heads, heads, kernel_size, dtype=torch.int32, device="cpu")
    counts.index_put_((head, pairs[..., 0], pairs[..., 1]), one, accumulate=True)
    small = counts.to(torch.int8)
    return small.pin_memory() if pinned else small


def key_counts(
    table: tuple[int, ...], heads: int, kernel_size: int, device: torch.device
) -> Tensor:
    """How often (head, source head, window slot) occurs in a key table, int8.

    On a GPU it is copied at every call, without a wait: a copy that outlived its launch would lie
    in the memory of a CUDA graph whose warm-up made it.

    Args:
        table: ``heads * kernel_size * 2`` integers.
        heads, kernel_size: of the attention.
        device: of the result.

    Example:
        >>> key_counts((0, 1, 0, 0, 0, 1), 1, 3, torch.device("cpu")).tolist()
        [[[1, 2, 0]]]
    """
    counts = _counted(table, heads, kernel_size, device.type == "cuda")
    return counts.to(device, non_blocking=True)


def window(options: Options, frames: int, head_dim: int) -> dict[str, int | float]:
    """What the Triton kernels of all attention ops are told about the window, by argument.

    Raises:
        UnsupportedInputError: the window is too wide.

    Example:
        >>> window(Options(kernel_size=5, dilation=9), 4, 64)["dilation"]
        4
    """
    if options.kernel_size >= 2**31:
        raise UnsupportedInputError(f"kernel_size {options.kernel_size} is above 2^31 - 1")
    return {
        "kernel_size": options.kernel_size,
        # Frames that are further apart than the clip is long never meet.
        "dilation": min(options.dilation, frames),
        "before": before(options),
        "shift": int(options.edge == "shift" and not options.causal),
        "zeros": float(options.edge == "zero"),
        "scale": head_dim**-0.5 if options.scale is None else options.scale,
    }


def _largest(parts: int, head_dim: int, options: Options, *, backward: bool) -> int:
    """Rows of the largest tile: what fits into registers."""
    if parts == 1:
        # Products outside of the tensor cores need many.
        return 16 if head_dim > 64 else 32
    # Each of these takes registers that 64 rows would need.
    reasons = (backward, bool(options.key_table), head_dim > 64)
    return 32 if sum(reasons) > 1 else 64


def _launch(operands: dict[str, Tensor], options: Options) -> Launch:
    """The launch on operands (outer, inner, heads, T, head_dim), by the kernels' names for them."""
    q = operands["q"]
    outer, inner, heads, frames, head_dim = q.shape
    if q.dtype not in PARTS:
        raise UnsupportedInputError(f"dtype {q.dtype} is not float16, bfloat16 or float32")
    if head_dim > 128:
        raise UnsupportedInputError(f"head_dim {head_dim} is above 128")
    if options.key_table and options.kernel_size > 127:
        raise UnsupportedInputError(f"kernel_size {options.kernel_size} is above 127")
    parts = PARTS[q.dtype] if triton_launch.has_tensor_cores(q.device) else 1
    backward = "do" in operands
    largest = _largest(parts, head_dim, options, backward=backward)
    cut = tile(heads, frames, options, largest=largest)
    sequences = outer * inner * heads
    programs = cut.programs(outer * inner, heads)
    if sequences >= 2**31 - 64 or programs >= 2**31:
        raise UnsupportedInputError(f"{sequences} sequences are too many")
    table = options.key_table
    counts = key_counts(tuple(table), heads, options.kernel_size, q.device) if table else None
    strides = {
        f"{name}_{dim}": stride
        for name, x in operands.items()
        for dim, stride in zip(("outer", "inner", "head", "frame"), x.stride(), strict=False)
    }
    own = {"sequences": sequences}
    if cut.rolling:
        own = {"back": cut.back, "stretches": cut.stretches, "stretch_tiles": STRETCH}
    numbers = {
        **own,
        "heads": heads,
        "inner": inner,
        "frames": frames,
        **window(options, frames, head_dim),
    }
    # Triton spreads fewer columns over the warps of a tile of 64 rows, or of two, several times.
    columns = max(64 if cut.rows == 64 or cut.rolling else 16, power_of_two(head_dim))
    constants = {
        "HEAD_DIM": head_dim,
        "COLUMNS": columns,
        "ALIGNED": triton_launch.alignment(*operands.values()),
        "PARTS": parts,
        "ROWS": cut.rows,
        "FRAMES": cut.frames,
        "TABLE_HEADS": cut.table_heads,
    }
    if not cut.rolling:
        constants["QUERIES"] = min(cut.rows, 32)
    arguments = {**operands, "key_counts": q if counts is None else counts, **strides, **numbers}
    module, kind = (triton_rolling_kernels, "_rolling") if cut.rolling else (triton_kernels, "")
    function = getattr(module, f"attention{kind}_{'backward' if backward else 'forward'}")
    num_warps = cut.rows // 8 * (2 if head_dim > 64 else 1) * (2 if parts == 1 else 1)
    if cut.rolling:
        # A thread has 16 bytes of a tile, or 32 where more threads would have too few registers.
        num_warps = min(8, cut.rows * columns * q.element_size() // (16 * 32))
    contents = None
    if table and q.is_meta:
        contents = {"key_counts": key_counts(tuple(table), heads, options.kernel_size, _CPU)}
    # Without a limit of its own the assembler stops at 128 registers on some GPUs, and spills.
    limits = {"maxnreg": 255} if (backward or cut.rolling) and num_warps <= 8 else None
    if cut.rolling and cut.rows == 16 and not backward and parts > 1:
        # As many as let 12 or 16 warps share a multiprocessor.
        limits = {"maxnreg": 168 if num_warps == 4 else 128}
    return Launch(
        function,
        programs,
        arguments,
        constants,
        num_warps,
        options=limits,
        contents=contents,
    )


def forward_launch(q: Tensor, k: Tensor, v: Tensor, o: Tensor, options: Options) -> Launch:
    """The launch of the forward kernel; see `op.Kernels`.

    Raises:
        UnsupportedInputError: naming the limit of the kernel.

    Example:
        >>> x = torch.empty(2, 196, 4, 8, 64, dtype=torch.float16, device="meta")
        >>> forward_launch(x, x, x, x, Options()).programs
        784
    """
    return _launch({"q": q, "k": k, "v": v, "o": o}, options)


def backward_launch(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    options: Options,
) -> Launch:
    """The launch of the backward kernel; see `op.Kernels`.

    Raises:
        UnsupportedInputError: naming the limit of the kernel.

    Example:
        >>> x = torch.empty(2, 196, 4, 8, 64, dtype=torch.float16, device="meta")
        >>> backward_launch(x, x, x, x, x, x, x, Options()).num_warps
        2
    """
    operands = {"q": q, "k": k, "v": v, "do": grad, "dq": dq, "dk": dk, "dv": dv}
    return _launch(operands, options)


class TritonKernels:
    """Runs the Triton kernels; see `op.Kernels`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, options: Options) -> None:
        """Writes the attention output into o."""
        triton_launch.run(forward_launch(q, k, v, o, options))

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        options: Options,
    ) -> None:
        """Writes the gradients of q, k and v into dq, dk and dv."""
        triton_launch.run(backward_launch(grad, q, k, v, dq, dk, dv, options))
