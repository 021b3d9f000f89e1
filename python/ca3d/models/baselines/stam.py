"""STAM: a vision transformer for every frame, and a second transformer over the frames (Sharir et
al., 2021). The first is timm's, the second torch's."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ca3d.models.baselines.baseline import Baseline, check_integers, check_tokens

__all__ = ["stam_b", "stam_tiny"]


class _Features(nn.Module):
    """The class token of the transformer over the frames' class tokens."""

    def __init__(
        self, spatial: VisionTransformer, temporal: nn.TransformerEncoder, frames: int
    ) -> None:
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spatial.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, frames + 1, spatial.embed_dim))
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, clip: Tensor) -> Tensor:
        batch = len(clip)
        frames = self.spatial(clip.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1))
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), frames], 1) + self.pos_embed
        features: Tensor = self.temporal(tokens)[:, 0]
        return features


def stam_b(
    num_classes: int,
    frames: int = 16,
    size: int = 112,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    patch: int = 16,
    temporal_depth: int = 6,
    temporal_heads: int = 8,
    temporal_hidden: int = 2048,
    temporal_dropout: float = 0.1,
) -> Baseline:
    """STAM-B: 118.9 million parameters, 69.7 GMAC at 101 classes and 16x112x112.

    Args:
        num_classes: number of classes.
        frames: frames of a clip.
        size: height and width of a clip in pixels, a multiple of `patch`.
        width: channels of a token, a multiple of both numbers of heads.
        depth: layers of the transformer for a frame, with perceptrons of four times the width.
        heads: its attention heads.
        patch: height and width of the patch that becomes a token.
        temporal_depth: layers of the transformer over the frames (normalised after each sum).
        temporal_heads: its attention heads.
        temporal_hidden: channels inside its perceptrons.
        temporal_dropout: its dropout.

    Returns:
        The model, in training mode.

    Raises:
        ValueError, TypeError: an option that is not allowed.

    Example:
        >>> model = stam_b(5, size=32, width=32, depth=1, heads=2, temporal_depth=1)
        >>> sorted(model.no_weight_decay())[0]
        'features.cls_token'
    """
    check_tokens(frames, size, width, depth, heads, patch)
    check_tokens(frames, size, width, temporal_depth, temporal_heads, patch)
    check_integers(temporal_hidden=temporal_hidden)
    spatial = VisionTransformer(
        img_size=size,
        patch_size=patch,
        num_classes=0,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
    )
    layer = nn.TransformerEncoderLayer(
        width, temporal_heads, temporal_hidden, temporal_dropout, batch_first=True
    )
    # Layers are copies of one another at the start, as `nn.TransformerEncoder` has it.
    temporal = nn.TransformerEncoder(layer, temporal_depth, enable_nested_tensor=False)
    classifier = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(classifier.weight, std=0.02)
    nn.init.zeros_(classifier.bias)
    return Baseline(_Features(spatial, temporal, frames), classifier, frames, size)


def stam_tiny(
    num_classes: int,
    frames: int = 16,
    size: int = 32,
    width: int = 48,
    depth: int = 4,
    heads: int = 4,
    patch: int = 8,
    temporal_depth: int = 2,
    temporal_heads: int = 4,
    temporal_hidden: int = 128,
    temporal_dropout: float = 0.1,
) -> Baseline:
    """A STAM of 48 channels for clips of 32 pixels; the arguments are those of `stam_b`.

    Example:
        >>> stam_tiny(num_classes=5).classifier.in_features
        48
    """
    return stam_b(
        num_classes,
        frames,
        size,
        width,
        depth,
        heads,
        patch,
        temporal_depth,
        temporal_heads,
        temporal_hidden,
        temporal_dropout,
    )
