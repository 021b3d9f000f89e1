"""TimeSformer: attention along time, then in space (Bertasius et al., 2021), by transformers."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import TimesformerConfig, TimesformerModel

from ca3d.models.baselines.baseline import Baseline, check_tokens

__all__ = ["timesformer_b", "timesformer_tiny"]


class _ClassToken(nn.Module):
    """The network's class token of clips in our order of dimensions."""

    def __init__(self, network: TimesformerModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, clip: Tensor) -> Tensor:
        tokens: Tensor = self.network(clip.transpose(1, 2)).last_hidden_state
        return tokens[:, 0]


def timesformer_b(
    num_classes: int,
    frames: int = 16,
    size: int = 112,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    patch: int = 16,
) -> Baseline:
    """TimeSformer-B: 121.2 million parameters, 96.3 GMAC at 101 classes and 16x112x112.

    Args:
        num_classes: number of classes.
        frames: frames of a clip.
        size: height and width of a clip in pixels, a multiple of `patch`.
        width: channels of a token, a multiple of `heads`; the inner layers have four times as many.
        depth: number of layers.
        heads: attention heads.
        patch: height and width of the patch that becomes a token.

    Returns:
        The model, in training mode.

    Raises:
        ValueError, TypeError: an option that is not allowed.

    Example:
        >>> model = timesformer_b(5, size=32, width=32, depth=1, heads=2)
        >>> sorted(name.rpartition(".")[2] for name in model.no_weight_decay())
        ['cls_token', 'position_embeddings', 'time_embeddings']
    """
    check_tokens(frames, size, width, depth, heads, patch)
    config = TimesformerConfig(
        image_size=size,
        patch_size=patch,
        num_frames=frames,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
    )
    classifier = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(classifier.weight, std=0.02)
    nn.init.zeros_(classifier.bias)
    return Baseline(_ClassToken(TimesformerModel(config)), classifier, frames, size)


def timesformer_tiny(
    num_classes: int,
    frames: int = 16,
    size: int = 32,
    width: int = 40,
    depth: int = 4,
    heads: int = 4,
    patch: int = 8,
) -> Baseline:
    """A TimeSformer with as many multiply-adds as `ca3d_tiny`; the arguments are those of
    `timesformer_b`.

    Example:
        >>> timesformer_tiny(num_classes=5).frames
        16
    """
    return timesformer_b(num_classes, frames, size, width, depth, heads, patch)
