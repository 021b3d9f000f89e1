"""Max-pooling over pairs of frames that keeps one byte an output element for its gradient."""

import torch
from torch import Tensor, nn

__all__ = ["TimePool"]


class TimePool(nn.Module):
    """Halves the number of frames by the maximum over pairs (kernel and stride 2 along time).

    Paper, section 3: the time axis is pooled after the second and the third block. A clip of one
    frame passes unchanged. Of two equal values the first takes the gradient; NaN is kept.

    Example:
        >>> TimePool()(torch.arange(4.0).view(1, 1, 4, 1, 1)).flatten().tolist()
        [1.0, 3.0]
    """

    def forward(self, clip: Tensor) -> Tensor:
        """Pools a clip.

        Args:
            clip: (B, C, T, H, W), T even or 1.

        Returns:
            (B, C, T / 2, H, W) in the layout of `ca3d.models.layout`.

        Raises:
            ValueError: T is odd and not 1.
        """
        frames = clip.shape[2]
        if frames == 1:
            return clip
        if frames % 2:
            raise ValueError(f"the time pool takes an even number of frames, got {frames}")
        # In the physical order of the elements, so that the gradient is made in that order too.
        first, second = clip.movedim(1, -1).unflatten(1, (-1, 2)).unbind(2)
        if not (torch.is_grad_enabled() and clip.requires_grad):
            return torch.maximum(first, second).movedim(-1, 1)
        # torch's own pooling would keep its input and 8 bytes for each output; `where` keeps the
        # choice alone. A comparison is false for NaN, which must not get lost here.
        second_wins = (second > first).logical_or_(second.isnan())
        return torch.where(second_wins, second, first).movedim(-1, 1)

    @staticmethod
    def frames_after(frames: int) -> int:
        """Number of frames that leave the pool.

        Args:
            frames: number of frames that enter it.

        Returns:
            ``frames / 2``, or 1 for 1.

        Raises:
            ValueError: `frames` is odd and not 1.

        Example:
            >>> TimePool.frames_after(16)
            8
        """
        if frames > 1 and frames % 2:
            raise ValueError(
                "frames must be 1 or halve evenly at every time pool (two pools: 1, 2 or a "
                f"multiple of 4), got {frames} frames in front of a pool"
            )
        return max(frames // 2, 1)
