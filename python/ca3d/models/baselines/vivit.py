"""ViViT, model 2, the factorised encoder: a transformer over the tubelets of each moment, and one
over the moments (Arnab et al., ICCV 2021), from timm's layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ca3d.models.baselines.baseline import Baseline, check_tokens
from ca3d.models.baselines.transformer import encoder, initialize_linear

__all__ = ["vivit_2", "vivit_tiny"]


class _ClassToken(nn.Module):
    """An encoder that puts a class token in front, and returns what it became."""

    def __init__(self, tokens: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, width))
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        self.layers = encoder(width, depth, heads)

    def forward(self, tokens: Tensor) -> Tensor:
        first = self.cls_token.expand(len(tokens), -1, -1)
        encoded: Tensor = self.layers(torch.cat([first, tokens], 1) + self.pos_embed)
        return encoded[:, 0]


class _Features(nn.Module):
    def __init__(self, embedding: nn.Conv3d, spatial: _ClassToken, temporal: _ClassToken) -> None:
        super().__init__()
        self.embedding, self.spatial, self.temporal = embedding, spatial, temporal

    def forward(self, clip: Tensor) -> Tensor:
        tubelets = self.embedding(clip).flatten(3).permute(0, 2, 3, 1)  # (B, T', tokens, width)
        moments = self.spatial(tubelets.flatten(0, 1)).unflatten(0, tubelets.shape[:2])
        features: Tensor = self.temporal(moments)
        return features


def vivit_2(
    num_classes: int,
    frames: int = 16,
    size: int = 112,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    patch: int = 16,
    tubelet: int = 4,
    temporal_depth: int = 6,
    temporal_heads: int = 8,
) -> Baseline:
    """ViViT-2: 130.1 million parameters, 17.9 GMAC at 101 classes and 16x112x112.

    Args:
        num_classes: number of classes.
        frames: frames of a clip, a multiple of `tubelet`.
        size: height and width of a clip in pixels, a multiple of `patch`.
        width: channels of a token, a multiple of both numbers of heads.
        depth: layers of the encoder over space.
        heads: its attention heads.
        patch: height and width of a tubelet.
        tubelet: frames of a tubelet.
        temporal_depth: layers of the encoder over time.
        temporal_heads: its attention heads.

    Returns:
        The model, in training mode.

    Raises:
        ValueError, TypeError: an option that is not allowed.

    Example:
        >>> model = vivit_2(5, size=32, width=32, depth=1, heads=2, temporal_depth=1)
        >>> len(model.no_weight_decay())
        4
    """
    check_tokens(frames, size, width, depth, heads, patch, tubelet)
    check_tokens(frames, size, width, temporal_depth, temporal_heads, patch, tubelet)
    features = _Features(
        nn.Conv3d(3, width, (tubelet, patch, patch), (tubelet, patch, patch)),
        _ClassToken((size // patch) ** 2, width, depth, heads),
        _ClassToken(frames // tubelet, width, temporal_depth, temporal_heads),
    )
    model = Baseline(features, nn.Linear(width, num_classes), frames, size)
    initialize_linear(model)
    return model


def vivit_tiny(
    num_classes: int,
    frames: int = 16,
    size: int = 32,
    width: int = 48,
    depth: int = 4,
    heads: int = 4,
    patch: int = 8,
    tubelet: int = 2,
    temporal_depth: int = 2,
    temporal_heads: int = 4,
) -> Baseline:
    """A ViViT-2 of 48 channels for clips of 32 pixels; the arguments are those of `vivit_2`.

    Example:
        >>> vivit_tiny(num_classes=5).classifier.in_features
        48
    """
    return vivit_2(
        num_classes,
        frames,
        size,
        width,
        depth,
        heads,
        patch,
        tubelet,
        temporal_depth,
        temporal_heads,
    )
