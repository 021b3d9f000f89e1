"""CA3D with one part replaced at a time: what the ablations of `ca3d study claims` train."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca3d.models.blocks import Head, ResidualBlock, ResidualColumn, TemporalBlock
from ca3d.models.initialization import initialize
from ca3d.models.model import CA3D
from ca3d.models.norm import BatchNorm
from ca3d.models.registry import register
from ca3d_kernels import LocalTemporalAttention

__all__ = [
    "ATTENTIONS",
    "ChannelNorm",
    "PatternAttention",
    "PreActivationBlock",
    "TokenHead",
    "ca3d_variant",
]

#: What a position attends to in a temporal half.
ATTENTIONS = ("local", "none", "full", "grid", "linear", "space-time")


@register("ca3d_variant")
def ca3d_variant(
    num_classes: int,
    *,
    attention: str = "local",
    norm: str = "batch",
    column: str = "residual",
    block: str = "post",
    head: str = "pool",
    position: bool = True,
    **options: Any,
) -> CA3D:
    """A `ca3d_tiny` with parts replaced; with none replaced it is `ca3d_tiny`.

    Args:
        num_classes: number of classes.
        attention: "local"; "none" (the temporal half is its column alone); "full" (all frames);
            "grid" (windows of `kernel_size` frames side by side, shifted by half a window in every
            second temporal half, as in Swin); "linear" (all frames, by the feature map elu + 1);
            "space-time" (all positions of all frames).
        norm: "batch", or "layer" (over the channels of each position).
        column: of the temporal halves: "residual", or "mlp" (the same with kernels of width 1).
        block: "post" (convolution, ReLU, normalisation), or "pre" (normalisation, ReLU,
            convolution) in all residual blocks.
        head: "pool", or "token" (a learned query that attends to all positions, as a class token
            does in its last layer).
        position: whether there is a positional table.
        **options: fields of `ca3d.models.options.CA3DOptions`.

    Returns:
        The model, in training mode.

    Raises:
        ValueError, TypeError: an option that is not allowed.

    Example:
        >>> ca3d_variant(num_classes=5, attention="grid", norm="layer").name
        'ca3d_variant'
    """
    allowed = {
        "attention": (attention, ATTENTIONS),
        "norm": (norm, ("batch", "layer")),
        "column": (column, ("residual", "mlp")),
        "block": (block, ("post", "pre")),
        "head": (head, ("pool", "token")),
        "position": (position, (True, False)),
    }
    for name, (value, values) in allowed.items():
        if value not in values:
            raise ValueError(f"{name} must be one of {values}, got {value!r}")
    model = CA3D(num_classes, "ca3d_variant", **{"widths": (8, 16, 32, 64), **options})
    model.options |= {name: value for name, (value, _) in allowed.items()}
    shifted = False
    for layer in model.layers.values():
        if isinstance(layer, TemporalBlock):
            if column == "mlp":
                layer.column = _narrow(layer.column)
            if attention != "local":
                pattern = PatternAttention(layer.attention, attention, shifted)
                layer.attention = pattern  # type: ignore[assignment]
                shifted = not shifted
            if attention == "none":
                layer.input_norm = nn.Identity()  # type: ignore[assignment]
    if block == "pre":
        _replace(model, ResidualBlock, PreActivationBlock)
    if norm == "layer":
        _replace(model, BatchNorm, lambda old: ChannelNorm(old.num_features, old.eps))
        model.head.norm = nn.LayerNorm(model.head.norm.num_features)  # type: ignore[assignment]
    if head == "token":
        model.head = TokenHead(model.head)
    if not position and "position" in model.layers:
        model.layers["position"] = nn.Identity()
    initialize(model)
    return model


class PatternAttention(nn.Module):
    """The attention of a temporal half with another pattern of what attends to what.

    Args:
        local: the attention whose projection, heads and window it takes over.
        pattern: one of `ATTENTIONS`; "local" is the same function by a mask.
        shifted: whether the windows of "grid" begin half a window earlier.

    Example:
        >>> local = LocalTemporalAttention(8, 2, 3)
        >>> PatternAttention(local, "grid")(torch.zeros(1, 8, 4, 6, 1)).shape
        torch.Size([1, 8, 4, 6, 1])
    """

    def __init__(self, local: LocalTemporalAttention, pattern: str, shifted: bool = False) -> None:
        super().__init__()
        self.heads, self.window = local.heads, local.kernel_size
        self.pattern, self.shifted = pattern, shifted
        if pattern != "none":
            if local.dense_qkv:
                raise ValueError(f"attention {pattern!r} has no dense_qkv")
            self.qkv_weight, self.qkv_bias = local.qkv_weight, local.qkv_bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to the same shape."""
        if self.pattern == "none":
            return torch.zeros_like(x)
        frames, place = x.shape[2], x.shape[3:]
        heads = x.unflatten(1, (self.heads, -1)).flatten(4)
        qkv = torch.einsum("hod,bhdtn->bhotn", self.qkv_weight, heads)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[:, :, None, None]
        q, k, v = (part.permute(0, 4, 1, 3, 2) for part in qkv.chunk(3, 2))  # (B, N, h, T, d)
        if self.pattern == "space-time":
            q, k, v = (part.transpose(1, 2).flatten(2, 3) for part in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v)
            y = y.unflatten(2, (-1, frames)).transpose(1, 2)
        elif self.pattern == "linear":
            y = _linear_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(frames, x.device))
        return y.permute(0, 2, 4, 3, 1).flatten(1, 2).unflatten(3, place)

    def mask(self, frames: int, device: torch.device | None = None) -> Tensor | None:
        """Which frame attends to which: (frames, frames) bool, or None for all to all.

        Args:
            frames: number of frames.
            device: of the mask.

        Example:
            >>> local = LocalTemporalAttention(8, 2, 2 + 1)
            >>> PatternAttention(local, "grid").mask(4).int().tolist()
            [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
        """
        if self.pattern == "full":
            return None
        at = torch.arange(frames, device=device)
        if self.pattern == "local":
            return (at[:, None] - at).abs() <= self.window // 2
        at = (at + (self.window // 2 if self.shifted else 0)) // self.window
        return at[:, None] == at


def _linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over all frames at a cost linear in them (Katharopoulos et al., ICML 2020)."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    summed = torch.einsum("...td,...te->...de", k, v)
    total = torch.einsum("...td,...d->...t", q, k.sum(-2))
    return torch.einsum("...td,...de->...te", q, summed) / total.unsqueeze(-1)


class PreActivationBlock(nn.Module):
    """``x + conv(ReLU(norm(conv(ReLU(norm(x))))))``, with the parameters of a `ResidualBlock`.

    Args:
        block: the block that it replaces.

    Example:
        >>> PreActivationBlock(ResidualBlock(8, (3, 3)))(torch.zeros(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.norm2, self.conv2 = block.norm2, block.conv2

    def forward(self, x: Tensor) -> Tensor:
        """Maps images or lines (N, C, h, w) to the same shape."""
        y = self.conv1(torch.relu(self.norm1(x)))
        return x + self.conv2(torch.relu(self.norm2(y)))


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each position.

    Args:
        channels: number of channels C.
        eps: added to the variance.

    Example:
        >>> ChannelNorm(4)(torch.randn(2, 4, 3, 3)).mean(1).abs().max().item() < 1e-6
        True
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (N, C, H, W)."""
        last = x.movedim(1, -1)
        shape = (x.shape[1],)
        return F.layer_norm(last, shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class TokenHead(Head):
    """As `Head`, with a mean over positions that is weighted by a learned query.

    Args:
        head: the head whose normalisation and dropout it takes over.

    Example:
        >>> TokenHead(Head(8))(torch.zeros(2, 8, 4, 7, 7)).shape
        torch.Size([2, 8])
    """

    def __init__(self, head: Head) -> None:
        nn.Module.__init__(self)
        self.norm, self.dropout = head.norm, head.dropout
        channels = int(head.norm.weight.numel())
        self.query = nn.Parameter(torch.randn(channels) * channels**-0.5)

    def forward(self, clip: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to (B, C).

        Raises:
            ValueError: one clip in training mode.
        """
        self.check_batch(clip.shape[0])
        tokens = clip.flatten(2).transpose(1, 2)
        weights = (tokens @ self.query * len(self.query) ** -0.5).softmax(1)
        return self.dropout(self.norm((weights.unsqueeze(2) * tokens).sum(1)))


def _narrow(column: ResidualColumn) -> ResidualColumn:
    """A column like this one, with kernels of width 1."""
    if not len(column):
        return column
    first = column[0]
    assert isinstance(first, ResidualBlock)
    convolution, norm = first.conv1, first.norm1
    return ResidualColumn(
        convolution.out_channels,
        len(column),
        (1, 1),
        convolution.groups,
        norm_eps=norm.eps,
        norm_momentum=norm.momentum or 0.1,
    )


def _replace(model: nn.Module, kind: type, make: Any) -> None:
    """Replaces all sub-modules of a type by what `make` makes of them."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is kind:
                setattr(module, name, make(child))
