"""Local temporal attention in a few of torch's own operators, for export to other runtimes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca3d_kernels.local_attention import reference
from ca3d_kernels.local_attention.op import Options

__all__ = ["PortableAttention"]


class PortableAttention(nn.Module):
    """What `LocalTemporalAttention.portable` returns: the layer for one clip of a fixed length.

    It is one grouped 1x1 convolution, gathers along one dimension, products, sums and a softmax;
    no tensor has more than four dimensions, and which frames meet is data.

    Args:
        weight: of the projection: (heads, 3 * head_dim, head_dim), or with dense_qkv (3 * C, C).
        bias: likewise without the last dimension; with a dimension T in front of the last one when
            it differs from frame to frame; or None.
        heads, frames: numbers of heads and of frames T.
        options: the window.

    Example:
        >>> from ca3d_kernels import LocalTemporalAttention
        >>> layer, x = LocalTemporalAttention(8, heads=2), torch.randn(1, 8, 6, 9)
        >>> y = layer(x.unsqueeze(4)).squeeze(4)
        >>> torch.allclose(layer.portable(frames=6)(x), y, atol=1e-6)
        True
    """

    rows: Tensor
    outside: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None, heads: int, frames: int, options: Options
    ) -> None:
        super().__init__()
        self.heads, self.frames = heads, frames
        self.dense_qkv = weight.dim() == 2
        self.head_dim = weight.shape[-1] // (heads if self.dense_qkv else 1)
        self.scale = self.head_dim**-0.5 if options.scale is None else options.scale
        self.zero = options.edge == "zero"
        weight = weight.detach()
        kernel = (weight if self.dense_qkv else weight.flatten(0, 1))[:, :, None, None]
        self.weight = nn.Parameter(kernel.clone(), requires_grad=False)
        self.bias = self.table = None
        if bias is not None and bias.dim() == weight.dim():
            by_frame = bias.detach() if self.dense_qkv else bias.detach().transpose(0, 1).flatten(1)
            if len(by_frame) != frames:
                raise ValueError(f"frames must be the {len(by_frame)} of the bias, got {frames}")
            # (3 * C, T, 1)
            self.table = nn.Parameter(by_frame.t()[:, :, None].clone(), requires_grad=False)
        elif bias is not None:
            self.bias = nn.Parameter(bias.detach().flatten().clone(), requires_grad=False)
        window = options.definition()
        rows, inside = reference.sources(
            heads,
            frames,
            *(window[name] for name in ("kernel_size", "dilation", "causal", "edge", "key_table")),
        )
        # Slots first: (K, heads * T), and (K, heads * T, 1).
        self.register_buffer("rows", rows.flatten(0, 1).t().contiguous())
        self.register_buffer("outside", ~inside.flatten(0, 1).t().contiguous().unsqueeze(-1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps lines (1, C, T, N) to the same shape."""
        groups = 1 if self.dense_qkv else self.heads
        y = F.conv2d(x, self.weight, self.bias, groups=groups)
        if self.table is not None:
            y = y + self.table
        size = self.head_dim
        # One row a head and frame, (heads * T, head_dim, N).
        if self.dense_qkv:
            y = y.reshape(3 * self.heads, size, self.frames, -1).transpose(1, 2)
            y = y.reshape(3 * self.heads * self.frames, size, -1)
            q, k, v = y.split(self.heads * self.frames)
        else:
            y = y.reshape(self.heads, 3 * size, self.frames, -1).transpose(1, 2)
            q, k, v = y.reshape(self.heads * self.frames, 3 * size, -1).split(size, 1)
        q = q * self.scale
        logits = []
        for rows, outside in zip(self.rows, self.outside, strict=True):
            logit = (q * k.index_select(0, rows)).sum(1)
            logits.append(logit.masked_fill(outside, 0.0 if self.zero else -torch.inf))
        weights = torch.stack(logits, 1).softmax(1)  # (heads * T, K, N)
        result = torch.zeros_like(q)
        for slot, (rows, outside) in enumerate(zip(self.rows, self.outside, strict=True)):
            weight = weights[:, slot : slot + 1]
            if self.zero:
                weight = weight.masked_fill(outside.unsqueeze(1), 0.0)
            result = result + weight * v.index_select(0, rows)
        result = result.reshape(self.heads, self.frames, size, -1).transpose(1, 2)
        return result.reshape(x.shape)
