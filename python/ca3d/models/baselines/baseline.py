"""What all baselines share: a network that makes features of a clip, and a linear classifier."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Baseline", "Mean", "check_integers", "check_tokens", "initialize_convolutions"]

_NOT_DECAYED = ("cls_token", "pos_embed", "position_embeddings", "time_embeddings")


class Baseline(nn.Module):
    """A video classifier made of a feature network and a linear layer.

    Args:
        features: maps clips (B, 3, T, H, W) to features (B, C).
        classifier: the final linear layer.
        frames: frames T of a clip.
        size: height and width of a clip if the network takes no other.

    Attributes:
        features, classifier, frames: as given.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
        >>> model = Baseline(network, nn.Linear(4, 5), frames=2)
        >>> model(torch.zeros(1, 3, 2, 8, 8)).shape
        torch.Size([1, 5])
    """

    def __init__(
        self, features: nn.Module, classifier: nn.Linear, frames: int, size: int | None = None
    ) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier
        self.frames = frames
        self._size = size

    def forward(self, clip: Tensor) -> Tensor:
        """Classifies clips.

        Args:
            clip: (B, 3, T, H, W), normalised, floating.

        Returns:
            Logits, (B, num_classes).

        Raises:
            ValueError: a shape that the model doesn't take.
            TypeError: not a floating-point tensor.
        """
        self._check(clip)
        logits: Tensor = self.classifier(self.features(clip))
        return logits

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the published recipe doesn't decay: class tokens and
        positional tables.

        Example:
            >>> Baseline(nn.Linear(1, 1), nn.Linear(1, 1), frames=1).no_weight_decay()
            set()
        """
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if name.rpartition(".")[2] in _NOT_DECAYED}

    def _check(self, clip: Tensor) -> None:
        if not isinstance(clip, Tensor) or not clip.is_floating_point():
            kind = clip.dtype if isinstance(clip, Tensor) else type(clip).__name__
            raise TypeError(f"clip must be a floating-point tensor (normalised), got {kind}")
        height, width = ("height", "width") if self._size is None else (self._size, self._size)
        shape = tuple(clip.shape)
        fits = len(shape) == 5 and shape[1:3] == (3, self.frames) and min(shape) >= 1
        if not fits or (self._size is not None and shape[3:] != (height, width)):
            raise ValueError(
                f"clip must have the shape (batch, 3, {self.frames}, {height}, {width}), got "
                f"{shape}; the options frames and size build a model for another"
            )


class Mean(nn.Module):
    """The mean of each channel, (B, C, T, H, W) to (B, C, 1, 1, 1), for any size.

    Example:
        >>> import torch
        >>> Mean()(torch.ones(1, 2, 3, 4, 4)).shape
        torch.Size([1, 2, 1, 1, 1])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Averages over frames and pixels."""
        return x.mean((2, 3, 4), keepdim=True)


def check_integers(**values: int) -> None:
    """Raises a TypeError or ValueError for the first value that is no integer of at least 1.

    Example:
        >>> check_integers(frames=0)
        Traceback (most recent call last):
        ValueError: frames must be at least 1, got 0
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_tokens(
    frames: int, size: int, width: int, depth: int, heads: int, patch: int, tubelet: int = 1
) -> None:
    """Raises a TypeError or ValueError if a transformer can't be built of these.

    Args:
        frames, size: of a clip.
        width: channels of a token.
        depth: number of layers.
        heads: attention heads.
        patch: height and width of what becomes a token.
        tubelet: its frames.

    Example:
        >>> check_tokens(16, 100, 768, 12, 12, patch=16)
        Traceback (most recent call last):
        ValueError: size must be a multiple of patch (16), got 100
    """
    check_integers(
        frames=frames,
        size=size,
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        tubelet=tubelet,
    )
    for name, value, of, divisor in (
        ("size", size, "patch", patch),
        ("width", width, "heads", heads),
        ("frames", frames, "tubelet", tubelet),
    ):
        if value % divisor:
            raise ValueError(f"{name} must be a multiple of {of} ({divisor}), got {value}")


def initialize_convolutions(model: nn.Module) -> None:
    """Draws convolutions Kaiming-normal by their outputs, linear layers N(0, 0.01), biases 0: as
    torchvision does for video residual networks.

    Args:
        model: whose layers to draw.

    Example:
        >>> layer = nn.Conv3d(1, 1, 3)
        >>> initialize_convolutions(layer)
        >>> layer.bias.item()
        0.0
    """
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
