"""The encoder layers under the baselines that are made of timm's."""

from __future__ import annotations

from timm.models.vision_transformer import Block
from torch import nn

__all__ = ["encoder", "initialize_linear"]


def encoder(width: int, depth: int, heads: int) -> nn.Sequential:
    """Layers of a vision transformer: attention and a perceptron of four times the width.

    Args:
        width: channels of a token.
        depth: number of layers.
        heads: attention heads.

    Returns:
        Layers that map (B, tokens, width) to the same shape, with a normalisation at the end.

    Example:
        >>> import torch
        >>> encoder(width=8, depth=2, heads=2)(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """
    blocks = (Block(width, heads, qkv_bias=True) for _ in range(depth))
    return nn.Sequential(*blocks, nn.LayerNorm(width, eps=1e-6))


def initialize_linear(model: nn.Module) -> None:
    """Draws all linear layers N(0, 0.02) cut off at two, biases 0: as vision transformers start.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> initialize_linear(layer)
        >>> layer.bias.abs().max().item()
        0.0
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
