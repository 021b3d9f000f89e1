"""Other ways to compute local temporal attention from a packed projection output.

All take what the projection of a channels-last model gives, qkv (B, 3C, T, H, W) in the memory
format channels_last_3d with the channels in the order (heads, 3, head_dim), and return
(B, C, T, H, W) in the same format.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ca3d_kernels import local_temporal_attention_packed


def sequences(qkv: Tensor, heads: int) -> Tensor:
    """Packed (B, H·W, heads, 3, T, head_dim) view of a projection output."""
    x = qkv.permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, H·W, 3C)
    return x.unflatten(-1, (heads, 3, -1)).permute(0, 2, 3, 4, 1, 5)


def features(o: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, T, H, W) of (B, H·W, heads, T, head_dim), copied only if it isn't channels-last."""
    x = o.permute(0, 3, 1, 2, 4).flatten(3)  # (B, T, H·W, C)
    x = x.unflatten(2, size).permute(0, 4, 1, 2, 3)
    return x.contiguous(memory_format=torch.channels_last_3d)


def ours(qkv: Tensor, heads: int, kernel_size: int = 5) -> Tensor:
    """The fused op."""
    o = local_temporal_attention_packed(sequences(qkv, heads), kernel_size=kernel_size)
    return features(o, (qkv.shape[3], qkv.shape[4]))


def sdpa(qkv: Tensor, heads: int, kernel_size: int = 5) -> Tensor:
    """Dense attention of all pairs of frames under a band mask."""
    q, k, v = (x.flatten(0, 1) for x in sequences(qkv, heads).unbind(3))
    frames = q.shape[-2]
    t = torch.arange(frames, device=qkv.device)
    distance = t - t[:, None] + kernel_size // 2
    band = (distance >= 0) & (distance < kernel_size)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=band)
    o = o.unflatten(0, (len(qkv), -1))
    return features(o, (qkv.shape[3], qkv.shape[4]))


def unfold(qkv: Tensor, heads: int, kernel_size: int = 5) -> Tensor:
    """Windows of k and v as tensors, cut out by a convolution with an identity kernel.

    The way of the published code, on the contiguous layout that it works in. The windows are zero
    padded, as there.
    """
    batch, channels, frames, height, width = qkv.shape
    x = qkv.contiguous().view(batch, heads, 3, channels // heads // 3, frames, height, width)
    q, k, v = x.unbind(2)  # (B, heads, head_dim, T, H, W)
    identity = torch.eye(kernel_size, dtype=qkv.dtype).view(kernel_size, 1, kernel_size, 1, 1)

    def windows(y: Tensor) -> Tensor:
        flat = y.reshape(-1, 1, frames, height, width)
        cut = F.conv3d(flat, identity, padding=(kernel_size // 2, 0, 0))
        return cut.view(*y.shape[:3], kernel_size, frames, height, width).movedim(3, -1)

    q, k, v = q.movedim(2, -1), windows(k).movedim(2, -1), windows(v).movedim(2, -1)
    logits = (k @ q.unsqueeze(-1)).squeeze(-1) * q.shape[-1] ** -0.5  # (B, heads, T, H, W, K)
    o = (logits.softmax(-1).unsqueeze(-2) @ v).squeeze(-2)
    o = o.movedim(-1, 2).reshape(batch, channels // 3, frames, height, width)
    return o.contiguous(memory_format=torch.channels_last_3d)
