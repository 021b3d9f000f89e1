"""Video Swin Transformer (Liu et al., CVPR 2022), by torchvision."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

from ca3d.models.baselines.baseline import Baseline, check_integers

__all__ = ["swin3d_t", "swin3d_tiny"]


def swin3d_t(
    num_classes: int,
    frames: int = 16,
    size: int = 112,
    width: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    patch: Sequence[int] = (4, 4, 4),
    window: Sequence[int] = (2, 7, 7),
    drop_path: float = 0.0,
) -> Baseline:
    """Swin3D-T with the paper's patches and windows: 27.7 million parameters, 4.9 GMAC.

    torchvision's own Swin3D-T is ``patch=(2, 4, 4), window=(8, 7, 7), drop_path=0.1``.

    Args:
        num_classes: number of classes.
        frames: frames of a clip; the last patch is filled up.
        size: height and width of the clips that it is meant for; it takes any.
        width: channels of the first stage, a multiple of its heads; each stage doubles them.
        depths: layers of the stages.
        heads: attention heads of the stages.
        patch: frames, height and width of the patch that becomes a token.
        window: tokens along time, height and width that attend to one another.
        drop_path: probability of skipping a layer; it grows from 0 to this with depth.

    Returns:
        The model, in training mode.

    Raises:
        ValueError, TypeError: an option that is not allowed.

    Example:
        >>> swin3d_t(5, width=12, depths=(1, 1), heads=(1, 2)).classifier.in_features
        24
    """
    check_integers(frames=frames, size=size, width=width)
    for name, values, length in (("patch", patch, 3), ("window", window, 3), ("depths", depths, 0)):
        if isinstance(values, str) or (length and len(values) != length):
            raise ValueError(f"{name} must have {length} entries, got {values!r}")
        check_integers(**{f"{name}[{i}]": value for i, value in enumerate(values)})
    if len(heads) != len(depths):
        raise ValueError(f"heads must have one entry a stage ({len(depths)}), got {heads!r}")
    for stage, count in enumerate(heads):
        check_integers(**{f"heads[{stage}]": count})
        if (width << stage) % count:
            raise ValueError(f"heads[{stage}] = {count} must divide {width << stage} channels")
    network = SwinTransformer3d(
        patch_size=list(patch),
        embed_dim=width,
        depths=list(depths),
        num_heads=list(heads),
        window_size=list(window),
        stochastic_depth_prob=drop_path,
    )
    network.head = nn.Identity()
    classifier = nn.Linear(network.num_features, num_classes)
    nn.init.trunc_normal_(classifier.weight, std=0.02)
    nn.init.zeros_(classifier.bias)
    return Baseline(network, classifier, frames)


def swin3d_tiny(
    num_classes: int,
    frames: int = 16,
    size: int = 32,
    width: int = 24,
    depths: Sequence[int] = (2, 2),
    heads: Sequence[int] = (3, 6),
    patch: Sequence[int] = (4, 4, 4),
    window: Sequence[int] = (2, 4, 4),
    drop_path: float = 0.0,
) -> Baseline:
    """A Swin3D of two stages for clips of 32 pixels; the arguments are those of `swin3d_t`.

    Example:
        >>> swin3d_tiny(num_classes=5).classifier.in_features
        48
    """
    return swin3d_t(num_classes, frames, size, width, depths, heads, patch, window, drop_path)
