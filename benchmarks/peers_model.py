"""The peer of the model benchmarks: CA3D in the plain way, contiguous tensors and 3-D convolutions.

Written from the description of the published model. Heads are the fast part of the channel index,
so that every layer with heads rearranges its tensors; blocks begin with a copy of their input; ReLU
makes new tensors; attention unfolds keys and values into windows by a convolution with an identity
kernel. Parameters have the published names and shapes, so that both models can hold the same
weights.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM, WINDOW = 64, 5


class HeadConv3d(nn.Module):
    """One filter bank per head; head h owns the channels h, h + heads, ..."""

    def __init__(
        self,
        channels: tuple[int, int],
        kernel: tuple[int, int, int],
        heads: int = 1,
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        inputs, outputs = (count // heads for count in channels)
        size = inputs * kernel[0] * kernel[1] * kernel[2]
        self.kernel, self.heads, self.stride = (inputs, *kernel), heads, stride
        self.weight = nn.Parameter(torch.randn(heads, outputs, size) * (2 / size) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(heads, outputs))

    def forward(self, x: Tensor) -> Tensor:
        padding = [(k - 1) // 2 for k in self.kernel[1:]]
        if self.heads > 1:
            x = x.unflatten(1, (-1, self.heads)).transpose(1, 2).flatten(1, 2)
        weight = self.weight.reshape(-1, *self.kernel)
        y = F.conv3d(x, weight, self.bias.flatten(), self.stride, padding, groups=self.heads)
        if self.heads > 1:
            y = y.unflatten(1, (self.heads, -1)).transpose(1, 2).flatten(1, 2)
        return y


class Norm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Residual(nn.Module):
    def __init__(self, channels: int, kernel: tuple[int, int, int], heads: int) -> None:
        super().__init__()
        self.conv = HeadConv3d((channels, channels), kernel, heads)
        self.conv2 = HeadConv3d((channels, channels), kernel, heads)
        self.norm1, self.norm2 = Norm(channels), Norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y = self.norm1(F.relu(self.conv(y)))
        return self.norm2(F.relu(self.conv2(y))) + x


class Column(nn.Module):
    def __init__(self, channels: int, depth: int, kernel: tuple[int, int, int], heads: int) -> None:
        super().__init__()
        blocks = [Residual(channels, kernel, heads) for _ in range(depth)]
        self.block = blocks[0]
        self.layer_list = nn.ModuleDict({str(i): blocks[i] for i in range(1, depth)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        for block in self.layer_list.values():
            x = block(x)
        return x


class Spatial(nn.Module):
    def __init__(self, channels: tuple[int, int], depth: int, kernel: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(channels[0]), Norm(channels[1])
        self.conv = HeadConv3d(channels, (1, kernel, kernel), heads, stride=(1, 2, 2))
        self.proj = Column(channels[1], depth, (1, 3, 3), heads)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        return self.proj(self.norm2(F.relu(self.conv(self.norm1(x)))))


class Position(nn.Module):
    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(channels, frames))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.pos_embed.unflatten(0, (-1, HEAD_DIM)).transpose(0, 1).flatten(0, 1)
        return x + rows[:, :, None, None]


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = HeadConv3d((channels, 3 * channels), (1, 1, 1), heads)

    def _unfold(self, x: Tensor) -> Tensor:
        """(B, C, T, h, w) -> (B, head_dim, K, heads, T, h, w), the window's slots in that order."""
        identity = torch.eye(WINDOW, dtype=x.dtype, device=x.device)[:, None, :, None, None]
        windows = F.conv3d(x.reshape(-1, 1, *x.shape[2:]), identity, padding=(WINDOW // 2, 0, 0))
        return windows.reshape(len(x), HEAD_DIM, WINDOW, self.heads, *x.shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, 1)
        scale = HEAD_DIM**-0.5
        q, k = q * scale, k * scale
        q = q.unflatten(1, (HEAD_DIM, self.heads))
        weights = torch.einsum("bdjthw,bdnjthw->bnjthw", q, self._unfold(k)).softmax(1)
        return torch.einsum("bnjthw,bdnjthw->bdjthw", weights, self._unfold(v)).flatten(1, 2)


class Temporal(nn.Module):
    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        heads = channels // HEAD_DIM
        self.block = nn.Module()
        self.block.norm1, self.block.norm2 = Norm(channels), Norm(channels)
        self.block.attn = Attention(channels, heads)
        self.block.proj = Column(channels, depth, (3, 1, 1), heads)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block.attn(self.block.norm1(x.clone())) + x
        return self.block.proj(self.block.norm2(y))


class PlainCA3D(nn.Module):
    """The published model with its pool placement, on contiguous tensors.

    Args:
        num_classes: number of classes.
        frames: frames of a clip.
        depths: residual blocks of the spatial halves 1 to 4 and the temporal halves 3 and 4.
        dropout: in front of the classifier.
    """

    def __init__(
        self,
        num_classes: int,
        frames: int = 16,
        depths: Sequence[int] = (2, 2, 2, 2, 2, 2),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        pool = nn.MaxPool3d((2, 1, 1))
        self.layer_list = nn.ModuleList(
            [
                Spatial((3, 64), depths[0], 7, 1),
                Spatial((64, 128), depths[1], 3, 1),
                Spatial((128, 256), depths[2], 3, 1),
                pool,
                Position(256, frames // 2),
                nn.Dropout(0.0),
                Temporal(256, depths[4]),
                Spatial((256, 512), depths[3], 3, 4),
                pool,
                Temporal(512, depths[5]),
                nn.AdaptiveAvgPool3d(1),
                Norm(512),
                nn.Dropout(dropout),
            ]
        )
        self.clf = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer_list:
            x = layer(x)
        return self.clf(x.flatten(1))
