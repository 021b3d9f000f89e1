"""TubeViT: one transformer over sparse tubes of several shapes (Piergiovanni et al., CVPR 2023),
from timm's layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca3d.models.baselines.baseline import Baseline, check_tokens
from ca3d.models.baselines.transformer import encoder, initialize_linear

__all__ = ["tubevit_b", "tubevit_tiny"]

# Kernel, stride and offset of each tube along time, height and width. Those along time are the
# published ones for 64 frames times 16 / 64; those in space are in sixteenths of a patch.
_TUBES = (
    ((2, 8, 8), (4, 32, 32), (0, 0, 0)),
    ((4, 4, 4), (2, 32, 32), (1, 8, 8)),
    ((1, 12, 12), (4, 32, 32), (0, 16, 16)),
    ((1, 16, 16), (8, 16, 16), (0, 0, 0)),
)


class _Tubes(nn.Module):
    """Tokens of all tubes: convolutions whose weights are one weight, resized."""

    def __init__(self, width: int, frames: int, size: int, patch: int) -> None:
        super().__init__()
        self.tubes = [
            tuple((t, h * patch // 16, w * patch // 16) for t, h, w in tube) for tube in _TUBES
        ]
        kernel = self.tubes[0][0]
        self.weight = nn.Parameter(torch.empty(width, 3, *kernel))
        self.bias = nn.Parameter(torch.zeros(len(self.tubes), width))
        nn.init.trunc_normal_(self.weight, std=0.02)
        places = [self._centres(tube, (frames, size, size)) for tube in self.tubes]
        self.register_buffer("positions", _sine_cosine(torch.cat(places), width), persistent=False)
        self.positions: Tensor

    @staticmethod
    def _centres(tube: tuple[tuple[int, ...], ...], clip: tuple[int, ...]) -> Tensor:
        """Where the middles of a tube's tokens are, (tokens, 3), in frames and pixels."""
        axes = []
        for kernel, stride, offset, length in zip(*tube, clip, strict=True):
            count = (length - offset - kernel) // stride + 1
            if count < 1:
                raise ValueError(f"clip of {clip} is too small for a tube of {tube[0]}")
            axes.append(torch.arange(count) * stride + offset + kernel // 2)
        return torch.cartesian_prod(*axes)

    def forward(self, clip: Tensor) -> Tensor:
        tokens = []
        for (kernel, stride, offset), bias in zip(self.tubes, self.bias, strict=True):
            weight: Tensor = self.weight
            if kernel != tuple(weight.shape[2:]):
                weight = F.interpolate(weight, kernel, mode="trilinear")
            t, h, w = offset
            part = clip[:, :, t:, h:, w:]
            tokens.append(F.conv3d(part, weight, bias, stride).flatten(2).transpose(1, 2))
        return torch.cat(tokens, 1) + self.positions


def _sine_cosine(places: Tensor, width: int) -> Tensor:
    """Fixed positional table (tokens, width): sines and cosines of each coordinate in turn."""
    pairs = width // 6
    rates = 10000.0 ** -(torch.arange(pairs) / pairs)
    angles = places[:, :, None] * rates
    table = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    return F.pad(table, (0, width - table.shape[1]))


class _Features(nn.Module):
    """Encodes the tubes' tokens, and averages them by weights of attention."""

    def __init__(self, tubes: _Tubes, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tubes = tubes
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.layers = encoder(width, depth, heads)
        self.pool = nn.Linear(width, 1)

    def forward(self, clip: Tensor) -> Tensor:
        tokens = torch.cat([self.cls_token.expand(len(clip), -1, -1), self.tubes(clip)], 1)
        tokens = self.layers(tokens)
        return (self.pool(tokens).softmax(1) * tokens).sum(1)


def tubevit_b(
    num_classes: int,
    frames: int = 16,
    size: int = 112,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    patch: int = 16,
) -> Baseline:
    """TubeViT-B: 85.4 million parameters, 26.8 GMAC at 101 classes and 16x112x112.

    Tubes are (2, 8, 8), (4, 4, 4), (1, 12, 12) and (1, 16, 16) frames and pixels, their strides
    (4, 32, 32), (2, 32, 32), (4, 32, 32) and (8, 16, 16): 295 tokens with the class token.

    Args:
        num_classes: number of classes.
        frames: frames of a clip, at least 5.
        size: height and width of a clip in pixels, at least twice `patch`.
        width: channels of a token, a multiple of `heads`, at least 6.
        depth: number of layers.
        heads: attention heads.
        patch: height and width of the largest tube, a multiple of 4; the others scale with it.

    Returns:
        The model, in training mode.

    Raises:
        ValueError, TypeError: an option that is not allowed.

    Example:
        >>> tubevit_b(5, width=24, depth=1, heads=2).features.tubes.positions.shape
        torch.Size([294, 24])
    """
    check_tokens(frames, size, width, depth, heads, patch)
    if patch % 4:
        raise ValueError(f"patch must be a multiple of 4, got {patch}")
    features = _Features(_Tubes(width, frames, size, patch), width, depth, heads)
    model = Baseline(features, nn.Linear(width, num_classes), frames, size)
    initialize_linear(model)
    return model


def tubevit_tiny(
    num_classes: int,
    frames: int = 16,
    size: int = 32,
    width: int = 48,
    depth: int = 4,
    heads: int = 4,
    patch: int = 8,
) -> Baseline:
    """A TubeViT of 48 channels for clips of 32 pixels; the arguments are those of `tubevit_b`.

    Example:
        >>> tubevit_tiny(num_classes=5).classifier.in_features
        48
    """
    return tubevit_b(num_classes, frames, size, width, depth, heads, patch)
