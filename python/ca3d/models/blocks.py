"""The named parts of CA3D: the two halves of a CAST block, their residual columns, the head.

Each part takes and returns clips (B, C, T, H, W) in the layout of `ca3d.models.layout`, and every
convolution in it is a 2-D convolution on a free view. A training step on a CPU keeps the output of
each convolution and each residual sum; what lies between an output and the next convolution
(`ca3d.models.norm`) is made again for the gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ca3d.models.layout import as_clip, as_frames, as_lines
from ca3d.models.norm import BatchNorm, hooked, normalise, normalise_and_convolve
from ca3d.models.sync_norm import SyncBatchNorm
from ca3d_kernels import LocalTemporalAttention

KeyTable = Tensor | Sequence[Sequence[Sequence[int]]]

__all__ = [
    "Head",
    "PositionalTable",
    "ResidualBlock",
    "ResidualColumn",
    "SpatialBlock",
    "TemporalBlock",
]


def _convolution(
    channels: tuple[int, int], kernel: tuple[int, int], heads: int, stride: int = 1
) -> nn.Conv2d:
    """A padded convolution with one filter bank per head and channels-last weights."""
    for count in channels:
        if count % heads:
            raise ValueError(f"channels ({count}) must be divisible by heads ({heads})")
    padding = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
    convolution = nn.Conv2d(*channels, kernel, stride, padding, groups=heads)
    return convolution.to(memory_format=torch.channels_last)


class ResidualBlock(nn.Module):
    """``x + BN(ReLU(conv(BN(ReLU(conv(x))))))``: every convolution is followed by ReLU, then BN.

    Paper, section 3 (layers of the residual columns). No activation follows the sum.

    Args:
        channels: number of channels C.
        kernel: (3, 3) on images, (3, 1) on lines of frames.
        heads: number of channel groups that don't mix.
        norm_eps, norm_momentum: of the batch normalisations.

    Example:
        >>> ResidualBlock(8, (3, 3))(torch.zeros(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        channels: int,
        kernel: tuple[int, int],
        heads: int = 1,
        *,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.conv1 = _convolution((channels, channels), kernel, heads)
        self.norm1 = BatchNorm(channels, norm_eps, norm_momentum)
        self.conv2 = _convolution((channels, channels), kernel, heads)
        self.norm2 = BatchNorm(channels, norm_eps, norm_momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images or lines (N, C, h, w) to the same shape."""
        y, _ = normalise_and_convolve(self.conv1(x), self.norm1, self.conv2)
        return normalise(y, self.norm2, x)


class ResidualColumn(nn.Sequential):
    """A chain of residual blocks, the second part of either half of a CAST block.

    Args:
        channels: number of channels C.
        depth: number of blocks; 0 makes the column the identity.
        kernel, heads, norm_eps, norm_momentum: see `ResidualBlock`.

    Example:
        >>> len(ResidualColumn(8, 2, (3, 1), heads=4))
        2
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        kernel: tuple[int, int],
        heads: int = 1,
        *,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__(
            *(
                ResidualBlock(
                    channels, kernel, heads, norm_eps=norm_eps, norm_momentum=norm_momentum
                )
                for _ in range(depth)
            )
        )

    def normalised(self, y: Tensor, norm: nn.Module, *, relu: bool = True) -> Tensor:
        """The column of ``norm(relu(y))``, of which a training step keeps y.

        A normalisation and the convolution behind it are one step, so that the input of the column
        and what lies within its blocks are not kept, and a block's sum is kept once.

        Args:
            y: images or lines (N, C, h, w); may be overwritten if `relu`.
            norm: the normalisation in front of the column.
            relu: False for the column of ``norm(y)``.

        Returns:
            (N, C, h, w).

        Example:
            >>> column = ResidualColumn(8, 2, (3, 1))
            >>> column.normalised(torch.randn(2, 8, 5, 5), BatchNorm(8)).shape
            torch.Size([2, 8, 5, 5])
        """
        blocks = [b for b in self if type(b) is ResidualBlock and not hooked(b)]
        if hooked(self) or len(blocks) != len(self):
            return self(normalise(y, norm, relu=relu))
        residual = None
        for block in blocks:
            y, residual = normalise_and_convolve(
                y, norm, block.conv1, residual, relu=relu, return_z=True
            )
            y, _ = normalise_and_convolve(y, block.norm1, block.conv2)
            norm, relu = block.norm2, True
        return normalise(y, norm, residual, relu=relu)


class SpatialBlock(nn.Module):
    """The spatial half of a CAST block: ``column(BN(ReLU(conv(BN(x)))))``, frame by frame.

    The convolution has stride 2, so that height and width are halved (rounded up).

    Args:
        in_channels, out_channels: channels that enter and leave.
        depth: number of residual blocks.
        kernel: side of the first convolution's square kernel (the column's is 3).
        heads: number of channel groups that don't mix.
        norm_eps, norm_momentum: of the batch normalisations.

    Example:
        >>> SpatialBlock(3, 8, depth=1, kernel=7)(torch.zeros(2, 3, 4, 15, 16)).shape
        torch.Size([2, 8, 4, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        depth: int = 2,
        *,
        kernel: int = 3,
        heads: int = 1,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.input_norm = BatchNorm(in_channels, norm_eps, norm_momentum)
        self.conv = _convolution((in_channels, out_channels), (kernel, kernel), heads, stride=2)
        self.norm = BatchNorm(out_channels, norm_eps, norm_momentum)
        self.column = ResidualColumn(
            out_channels, depth, (3, 3), heads, norm_eps=norm_eps, norm_momentum=norm_momentum
        )

    def forward(self, clip: Tensor) -> Tensor:
        """Maps (B, in_channels, T, H, W) to (B, out_channels, T, ceil(H / 2), ceil(W / 2))."""
        y, _ = normalise_and_convolve(as_frames(clip), self.input_norm, self.conv, relu=False)
        return as_clip(self.column.normalised(y, self.norm), clip.shape[0])


class TemporalBlock(nn.Module):
    """The temporal half of a CAST block: ``column(BN(x + attention(BN(x))))``, pixel by pixel.

    Heads don't mix anywhere in it: the projection, the attention and the temporal convolutions
    (kernel 3) each work on one head's channels.

    Args:
        channels: number of channels C.
        heads: number of attention heads, contiguous groups of channels.
        depth: number of residual blocks.
        kernel_size: attention window in frames.
        edge, scale, key_table, dense_qkv: options of `ca3d_kernels.LocalTemporalAttention`.
        norm_eps, norm_momentum: of the batch normalisations.

    Example:
        >>> TemporalBlock(16, heads=2, depth=1)(torch.zeros(1, 16, 8, 3, 3)).shape
        torch.Size([1, 16, 8, 3, 3])
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int = 2,
        *,
        kernel_size: int = 5,
        edge: str = "truncate",
        scale: float | None = None,
        key_table: KeyTable | None = None,
        dense_qkv: bool = False,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.input_norm = BatchNorm(channels, norm_eps, norm_momentum)
        self.attention = LocalTemporalAttention(
            channels,
            heads,
            kernel_size,
            edge=edge,
            scale=scale,
            key_table=key_table,
            dense_qkv=dense_qkv,
        )
        self.norm = BatchNorm(channels, norm_eps, norm_momentum)
        self.column = ResidualColumn(
            channels, depth, (3, 1), heads, norm_eps=norm_eps, norm_momentum=norm_momentum
        )

    def forward(self, clip: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to the same shape."""
        lines = as_lines(clip)
        attended = self.attention(self.input_norm(lines).unsqueeze(4))
        lines = lines + as_lines(attended)
        return self.column.normalised(lines, self.norm, relu=False).unflatten(3, clip.shape[3:])


class PositionalTable(nn.Module):
    """Adds a learned vector for each frame number, the same at every pixel.

    Args:
        channels: number of channels C.
        frames: number of frames T; the table fixes it.

    Example:
        >>> PositionalTable(8, frames=4)(torch.zeros(1, 8, 4, 2, 2)).shape
        torch.Size([1, 8, 4, 2, 2])
    """

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, frames))

    def forward(self, clip: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to the same shape.

        Raises:
            ValueError: T isn't the table's number of frames.
        """
        if clip.shape[2] != self.weight.shape[1]:
            raise ValueError(
                f"the positional table holds {self.weight.shape[1]} frames, got {clip.shape[2]}; "
                "build the model with another number of frames"
            )
        # Under autocast the clip may be narrower than the table, and the sum must stay so.
        return clip + self.weight.to(clip.dtype)[:, :, None, None]


class Head(nn.Module):
    """Mean over time and space, batch normalisation, dropout: a clip becomes one vector.

    Args:
        channels: number of channels C.
        dropout: probability of dropping a feature in training.
        norm_eps, norm_momentum: of the batch normalisation.

    Example:
        >>> Head(8)(torch.zeros(2, 8, 4, 7, 7)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        channels: int,
        dropout: float = 0.5,
        *,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, norm_eps, norm_momentum)
        self.dropout = nn.Dropout(dropout)

    def check_batch(self, batch: int) -> None:
        """Refuses a training batch of one clip, whose batch statistics don't exist.

        Raises:
            ValueError: `batch` is below 2 while the normalisation uses batch statistics.

        Example:
            >>> Head(8).eval().check_batch(1)
        """
        alone = not isinstance(self.norm, SyncBatchNorm) or self.norm.processes == 1
        if self.norm.training and alone and batch < 2:
            raise ValueError(
                f"training needs a batch of at least 2 clips, got {batch}: the head normalises "
                "over the batch after its global pool (use model.eval(), or drop the last batch)"
            )

    def forward(self, clip: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to (B, C).

        Raises:
            ValueError: one clip in training mode.
        """
        self.check_batch(clip.shape[0])
        # The mean runs over the leading dimensions of the physical order, so that its gradient
        # arrives in that order too.
        return self.dropout(self.norm(clip.movedim(1, -1).mean((1, 2, 3))))
