"""Local temporal attention as a layer for video features."""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca3d_kernels import triton_launch
from ca3d_kernels.half_storage import half_storage
from ca3d_kernels.local_attention import op
from ca3d_kernels.local_attention.functional import (
    KeyTable,
    check_count,
    check_options,
    published_key_table,
    with_context,
)
from ca3d_kernels.local_attention.portable import PortableAttention
from ca3d_kernels.qkv_attention import op as qkv_attention


class LocalTemporalAttention(nn.Module):
    """Multi-head attention of every pixel to itself in the neighbouring frames.

    Queries, keys and values come from one linear map per head (heads are contiguous groups of
    channels), then `local_temporal_attention` runs along time, pixel by pixel; no positional
    embedding is added. The layer works on the ``torch.channels_last_3d`` layout without a copy;
    input in another layout is converted once.

    Args:
        channels: number of channels C.
        heads: number of heads; must divide channels.
        kernel_size: number of frames in the window.
        dilation, causal, edge, scale, key_table: see `local_temporal_attention`.
        preset: ``"published"`` computes what the published CA3D code does: edge ``"zero"``, scale
            ``1 / head_dim`` and `published_key_table`. It can't be combined with these arguments.
        dense_qkv: one map from all channels to all queries, keys and values instead of one per
            head.
        bias: whether the maps have biases.
        out_proj: whether a linear map of all channels follows the attention.
        dropout: probability of zeroing an element of the result in training.
        backend: see `local_temporal_attention`.
        device, dtype: of the parameters.

    Attributes:
        qkv_weight: (heads, 3 * head_dim, head_dim): the rows of ``qkv_weight[h]`` make q, k and v
            of head h. With dense_qkv (3 * C, C): rows of all queries, keys, then values.
        qkv_bias: (heads, 3 * head_dim), (3 * C,) with dense_qkv, or None. `fold` with a position
            table makes it one for every frame: (heads, T, 3 * head_dim), (T, 3 * C) with dense_qkv.
        out_proj: `torch.nn.Linear` or None.

    Shape:
        (B, C, T, H, W) to the same shape, in channels_last_3d layout.

    Raises:
        TypeError, ValueError: an option is out of range, channels are not divisible by heads, or
            the input has another rank, number of channels, dtype or device.

    Example:
        >>> layer = LocalTemporalAttention(channels=32, heads=4, kernel_size=5)
        >>> layer(torch.randn(2, 32, 8, 7, 7)).shape
        torch.Size([2, 32, 8, 7, 7])
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        kernel_size: int = 5,
        *,
        dilation: int = 1,
        causal: bool = False,
        edge: str = "truncate",
        scale: float | None = None,
        key_table: KeyTable | None = None,
        preset: str | None = None,
        dense_qkv: bool = False,
        bias: bool = True,
        out_proj: bool = False,
        dropout: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = check_count("channels", channels)
        self.heads = check_count("heads", heads)
        if self.channels % self.heads:
            raise ValueError(f"channels={channels} must be divisible by heads={heads}")
        self.head_dim = self.channels // self.heads
        if preset == "published":
            if (edge, scale, key_table) != ("truncate", None, None):
                raise ValueError(
                    "preset='published' sets edge, scale and key_table; leave them at their "
                    f"defaults, got edge={edge!r}, scale={scale!r}, key_table={key_table!r}"
                )
            edge, scale = "zero", 1 / self.head_dim
            key_table = published_key_table(self.heads, check_count("kernel_size", kernel_size))
        elif preset is not None:
            raise ValueError(f"preset must be 'published' or None, got {preset!r}")
        for name, value in (("bias", bias), ("dense_qkv", dense_qkv)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {value!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point one or None, got {dtype}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be in 0 to 1, got {dropout!r}")
        self.preset = preset
        self.dense_qkv = dense_qkv
        self._options = check_options(
            self.heads, kernel_size, dilation, causal, scale, edge, key_table, backend
        )
        shape = (
            (3 * self.channels, self.channels)
            if dense_qkv
            else (self.heads, 3 * self.head_dim, self.head_dim)
        )
        self.qkv_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.qkv_bias: nn.Parameter | None
        if bias:
            self.qkv_bias = nn.Parameter(torch.empty(shape[:-1], device=device, dtype=dtype))
        else:
            self.register_parameter("qkv_bias", None)
        self.out_proj = (
            nn.Linear(channels, channels, bias=bias, device=device, dtype=dtype)
            if out_proj
            else None
        )
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    @property
    def kernel_size(self) -> int:
        """Number of frames in the window."""
        return self._options.kernel_size

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that `local_temporal_attention` is called with.

        Example:
            >>> LocalTemporalAttention(8, 2, kernel_size=3).options["kernel_size"]
            3
        """
        options = self._options._asdict()
        flat = options["key_table"]
        table = torch.tensor(flat).view(self.heads, self.kernel_size, 2) if flat else None
        return {**options, "key_table": table, "backend": options["backend"] or None}

    def reset_parameters(self) -> None:
        """Draws all weights from Xavier's normal distribution and sets the biases to 0.

        As in the published code, the fan-out of the map per head counts the rows of all heads:
        the standard deviation is ``sqrt(2 / (head_dim + 3 * channels))``.

        Example:
            >>> LocalTemporalAttention(8, 2).qkv_bias.abs().max().item()
            0.0
        """
        with torch.no_grad():
            fan_in = self.qkv_weight.shape[-1]
            self.qkv_weight.normal_(0, math.sqrt(2 / (fan_in + 3 * self.channels)))
            if self.qkv_bias is not None:
                self.qkv_bias.zero_()
            if self.out_proj is not None:
                nn.init.xavier_normal_(self.out_proj.weight)
                if self.out_proj.bias is not None:
                    self.out_proj.bias.zero_()

    @torch.no_grad()
    def fold(
        self, scale: Tensor, shift: Tensor, position: Tensor | None = None
    ) -> "LocalTemporalAttention":
        """A copy for inference that contains what comes before the layer.

        ``fold(scale, shift, position)(x)`` is ``self(scale * (x + position) + shift)``: batch
        normalisation with fixed statistics, after a position table, costs nothing more than a bias.

        Args:
            scale: factor of each channel, (C,); of a batch normalisation
                ``weight / sqrt(running_var + eps)``.
            shift: summand of each channel, (C,); ``bias - running_mean * scale``.
            position: (C, T), added to every clip, which must then have T frames; or None.

        Returns:
            A layer with a bias whose parameters need no gradient. Its weights and biases are
            computed in float64 and rounded once.

        Raises:
            TypeError: not a tensor.
            ValueError: a wrong shape.

        Example:
            >>> layer, x = LocalTemporalAttention(8, 2), torch.randn(1, 8, 4, 3, 3)
            >>> scale, shift, position = torch.randn(8), torch.randn(8), torch.randn(8, 4)
            >>> y = x + position[:, :, None, None]
            >>> y = layer(y * scale[:, None, None, None] + shift[:, None, None, None])
            >>> torch.allclose(layer.fold(scale, shift, position)(x), y, atol=1e-5)
            True
        """
        for name, x, dims in (("scale", scale, 1), ("shift", shift, 1), ("position", position, 2)):
            if x is None and name == "position":
                continue
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
            if x.dim() != dims or x.shape[0] != self.channels:
                shape = f"({self.channels}, T)" if dims == 2 else f"({self.channels},)"
                raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
        weight, bias = self.qkv_weight, self.qkv_bias
        if bias is not None and bias.dim() == weight.dim():
            raise ValueError("this layer has a position table already: fold the layer it came from")
        factor, summand = scale.to(weight).double(), shift.to(weight).double()[:, None]
        if position is not None:
            summand = summand + factor[:, None] * position.to(weight).double()
        if not self.dense_qkv:
            factor = factor.view(self.heads, 1, self.head_dim)
            summand = summand.view(self.heads, self.head_dim, -1)
        # (..., 3 * head_dim, T), or (3 * C, T), with T = 1 if all frames are alike.
        table = weight.double() @ summand
        if bias is not None:
            table += bias.double().unsqueeze(-1)
        table = table.squeeze(-1) if position is None else table.transpose(-1, -2).contiguous()
        # The parameters of this layer are not copied, only replaced.
        memo: dict[int, object] = {id(weight): nn.Parameter((weight.double() * factor).to(weight))}
        if bias is not None:
            memo[id(bias)] = bias
        folded = copy.deepcopy(self, memo)
        folded.qkv_bias = nn.Parameter(table.to(weight))
        return folded.requires_grad_(False)

    def portable(self, frames: int) -> PortableAttention:
        """The layer in a few of torch's own operators, for export to other runtimes.

        Args:
            frames: number of frames T of the clips.

        Returns:
            A layer that maps (1, C, T, N), one clip of N pixels, to the same shape; its parameters
            are copies that need no gradient. No tensor in it has more than four dimensions.

        Raises:
            ValueError: the layer has an output projection, or a position table for another T.

        Example:
            >>> layer = LocalTemporalAttention(8, heads=2).portable(frames=4)
            >>> layer(torch.zeros(1, 8, 4, 9)).shape
            torch.Size([1, 8, 4, 9])
        """
        if self.out_proj is not None:
            raise ValueError("portable takes a layer without output projection (out_proj=False)")
        frames = check_count("frames", frames)
        return PortableAttention(self.qkv_weight, self.qkv_bias, self.heads, frames, self._options)

    def _project(self, x: Tensor) -> Tensor:
        """QKV of pixels (B, T, N, C), as a view (B, N, heads, 3, T, head_dim)."""
        weight, bias = self.qkv_weight, self.qkv_bias
        table = None
        if bias is not None and bias.dim() == weight.dim():
            table, bias = bias if self.dense_qkv else bias.transpose(0, 1).flatten(1), None
        y = self._map(x, weight, bias)
        if table is not None:
            y = y + table.unsqueeze(1).to(y.dtype)
        if self.dense_qkv:
            return y.unflatten(-1, (3, self.heads, self.head_dim)).permute(0, 2, 4, 3, 1, 5)
        return y.unflatten(-1, (self.heads, 3, self.head_dim)).permute(0, 2, 3, 4, 1, 5)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear maps of pixels (B, T, N, C) to (B, T, N, 3 * C)."""
        if self.dense_qkv:
            return half_storage(F.linear)(x, weight, bias)
        if not _convolution_is_fast(x):
            return _per_head_linear(x, weight, bias)
        # The map per head is a grouped 1x1 convolution, which reads and writes this layout.
        kernel = weight.flatten(0, 1)[:, :, None, None]
        shift = None if bias is None else bias.flatten()
        y = half_storage(F.conv2d)(x.permute(0, 3, 1, 2), kernel, shift, groups=self.heads)
        return y.permute(0, 2, 3, 1)

    def _attend(self, x: Tensor) -> Tensor:
        """Projection and attention of pixels (B, T, N, C), fused where a kernel can."""
        options = with_context(self._options)
        if not self.dense_qkv and (x.is_cuda or triton_launch.interpreted()):
            operands = _autocast(x, self.qkv_weight, self.qkv_bias)
            if qkv_attention.is_fused(*operands, options):
                return qkv_attention.qkv_attention(*operands, options)
        x = op.attention_packed(self._project(x), *options)
        return x.permute(0, 3, 1, 2, 4).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        """Attends along T, (B, C, T, H, W) to the same shape; see the class."""
        self._check_input(x)
        size = x.shape[-2:]
        # All views below keep the channels last: strides of size-1 dimensions that say otherwise
        # make torch's convolution copy.
        x = x.contiguous(memory_format=torch.channels_last_3d)
        x = x.permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, N, C)
        x = self._attend(x)  # (B, T, N, C)
        if self.out_proj is not None:
            x = self.out_proj(x)
        return self.dropout(x).unflatten(2, size).permute(0, 4, 1, 2, 3)

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() != 5 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (B, {self.channels}, T, H, W), got {tuple(x.shape)}")
        if 0 in x.shape[1:]:
            raise ValueError(f"x must not be empty in C, T, H and W, got {tuple(x.shape)}")
        weight, bias = self.qkv_weight, self.qkv_bias
        if bias is not None and bias.dim() == weight.dim() and x.shape[2] != bias.shape[-2]:
            raise ValueError(
                f"x must have the {bias.shape[-2]} frames of the position table that was folded "
                f"into the layer, got {x.shape[2]}"
            )
        if x.device != weight.device:
            raise ValueError(f"x must be on the layer's device {weight.device}, got {x.device}")
        if not x.is_floating_point() or (
            x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)
        ):
            raise TypeError(f"x must have the layer's dtype {weight.dtype}, got {x.dtype}")

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        options, text = self._options, [str(self.channels), f"heads={self.heads}"]
        text.append(f"kernel_size={options.kernel_size}")
        text += [f"dilation={options.dilation}"] * (options.dilation != 1)
        text += ["causal=True"] * options.causal
        if self.preset is not None:
            text.append(f"preset={self.preset!r}")
        else:
            text += [f"edge={options.edge!r}"] * (options.edge != "truncate")
            text += [f"scale={options.scale}"] * (options.scale is not None)
            text += ["key_table=..."] * bool(options.key_table)
        text += ["dense_qkv=True"] * self.dense_qkv
        text += ["bias=False"] * (self.qkv_bias is None)
        text += [f"backend={options.backend!r}"] * bool(options.backend)
        return ", ".join(text)


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in the dtype that autocast gives to torch's projection."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


# Asked for once: torch.compile can't trace the question.
_HAS_BFLOAT16 = (
    torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


def _convolution_is_fast(x: Tensor) -> bool:
    """Whether torch has a fast convolution for this input.

    On a CPU it has one for bfloat16 where the processor has instructions for that, and for float32
    (in which float16 is convolved) with several threads. Otherwise it copies to the other layout.
    """
    if x.device.type != "cpu":
        return True
    if x.dtype == torch.bfloat16:
        return _HAS_BFLOAT16
    # torch.compile and torch.export can't trace the number of threads.
    several = torch.compiler.is_compiling() or torch.get_num_threads() > 1
    return x.dtype in (torch.float32, torch.float16) and several


def _per_head_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The map per head as matrix products, (B, T, N, C) -> (B, T, N, 3 * C)."""
    heads = len(weight)
    biases = [None] * heads if bias is None else bias
    pixels = x.unflatten(-1, (heads, -1)).unbind(-2)
    linear = half_storage(F.linear)
    maps = [linear(*operands) for operands in zip(pixels, weight, biases, strict=True)]
    return torch.cat(maps, -1)
