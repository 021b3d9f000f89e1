"""CA3D: convolution and local temporal attention, assembled from the parts in `blocks`."""

from typing import Any

import torch
from torch import Tensor, nn

from ca3d.models import presets
from ca3d.models.blocks import Head, PositionalTable, SpatialBlock, TemporalBlock
from ca3d.models.initialization import initialize
from ca3d.models.layout import to_channels_last
from ca3d.models.options import CA3DOptions
from ca3d.models.registry import register
from ca3d.models.time_pool import TimePool
from ca3d_kernels import published_key_table

__all__ = ["CA3D", "ca3d", "ca3d_l", "ca3d_tiny"]


class CA3D(nn.Module):
    """The CA3D video classifier (paper, section 3).

    Four CAST blocks: each begins with a spatial half that halves height and width; blocks 3 and 4
    go on with a temporal half, local attention along time with temporal convolutions. Time is
    pooled by 2 for each block with a temporal half: before it, or between its halves
    (``pool="published"``). A learned positional table is added once, before the first temporal
    half. Heads are contiguous groups of channels.

    All parts work in the layout of `ca3d.models.layout`; other input is converted once, on entry.
    `forward` is ``classify(encode_clip(encode_pairs(encode_frames(clip))))``: the first part treats
    every frame by itself and the second every pair of frames, so that a stream can keep their
    results.

    Args:
        num_classes: number of classes.
        name: the name under which `ca3d.models.create` rebuilds the model.
        **options: fields of `ca3d.models.options.CA3DOptions`.

    Attributes:
        name: the registered name.
        options: keyword arguments (`num_classes` among them) that rebuild the model.
        layers: the parts in order, by name: spatial1, ..., pool3, position, temporal3, ...
        frames: frames of a clip.
        head: mean, normalisation and dropout.
        classifier: the final linear layer.

    Raises:
        ValueError, TypeError: see `ca3d.models.options.CA3DOptions`; also a number of frames that
            the time pools don't halve.

    Example:
        >>> import torch
        >>> model = CA3D(5, widths=(8, 16, 32, 64)).eval()
        >>> model(torch.zeros(2, 3, 16, 32, 32)).shape
        torch.Size([2, 5])
    """

    name: str
    options: dict[str, Any]

    def __init__(self, num_classes: int, name: str = "ca3d", **options: Any) -> None:
        super().__init__()
        config = CA3DOptions(**options)
        self.name = name
        self.options = {"num_classes": num_classes, **config.as_dict()}
        self.frames = config.frames
        self.layers = nn.ModuleDict(_layers(config))
        norm = {"norm_eps": config.norm_eps, "norm_momentum": config.norm_momentum}
        self.head = Head(config.widths[-1], config.dropout, **norm)
        self.classifier = nn.Linear(config.widths[-1], num_classes)
        # Everything before the first pool sees single frames; from the positional table (or the
        # first temporal half) on, a layer sees the whole clip.
        names = list(self.layers)
        pools = [i for i, n in enumerate(names) if n.startswith("pool")]
        temporal = [i for i, n in enumerate(names) if n.startswith(("position", "temporal"))]
        self._clip_start = min(temporal, default=len(names))
        self._pair_start = min(pools, default=self._clip_start)
        initialize(self)

    def forward(self, clip: Tensor) -> Tensor:
        """Classifies clips.

        Args:
            clip: (B, 3, T, H, W), normalised, floating; T is the option `frames`, H and W are any.
                A `channels_last_3d` clip is used as it is, any other is converted once.

        Returns:
            Logits, (B, num_classes).

        Raises:
            ValueError: another shape, or a single clip in training mode.
            TypeError: not a floating-point tensor, or not of the model's dtype without autocast.
        """
        self._check_clip(clip)
        if clip.shape[2] != self.frames:
            raise ValueError(
                f"this model takes clips of {self.frames} frames, got {clip.shape[2]} (shape "
                f"{tuple(clip.shape)}); the option frames={clip.shape[2]} builds one that fits"
            )
        self.head.check_batch(clip.shape[0])
        return self.classify(self.encode_clip(self.encode_pairs(self.encode_frames(clip))))

    @property
    def frames_per_unit(self) -> int:
        """Frames that `encode_pairs` makes one of: 2, or 1 where there is nothing to pool.

        Example:
            >>> ca3d_tiny(num_classes=5).frames_per_unit
            2
        """
        return 2 if self._pair_start < self._clip_start and self.frames > 1 else 1

    def encode_frames(self, clip: Tensor) -> Tensor:
        """The part that treats every frame by itself, up to the first time pool.

        Args:
            clip: (B, 3, T, H, W), normalised; any T.

        Returns:
            Features (B, C, T, h, w): of block 2, with ``pool="published"`` of block 3.

        Raises:
            ValueError, TypeError: as `forward`.

        Example:
            >>> import torch
            >>> model = ca3d_tiny(num_classes=5).eval()
            >>> model.encode_frames(torch.zeros(1, 3, 3, 32, 32)).shape
            torch.Size([1, 16, 3, 8, 8])
        """
        self._check_clip(clip)
        return self._run(to_channels_last(clip), 0, self._pair_start)

    def encode_pairs(self, features: Tensor) -> Tensor:
        """The part that treats every pair of frames by itself: the first pool and what follows it.

        Args:
            features: (B, C, T, h, w) from `encode_frames`; frames 2i and 2i + 1 are a pair.

        Returns:
            Features (B, C', T / 2, h', w') of block 3's spatial half.

        Example:
            >>> import torch
            >>> model = ca3d_tiny(num_classes=5).eval()
            >>> model.encode_pairs(torch.zeros(1, 16, 2, 8, 8)).shape
            torch.Size([1, 32, 1, 4, 4])
        """
        return self._run(features, self._pair_start, self._clip_start)

    def encode_clip(self, features: Tensor) -> Tensor:
        """The part that needs the whole clip: positional table, temporal halves, block 4.

        Args:
            features: (B, C', T / 2, h', w') from `encode_pairs`, of a whole clip.

        Returns:
            Features (B, C'', T / 4, h'', w'') for `classify`.

        Raises:
            ValueError: another number of frames than the positional table's.

        Example:
            >>> import torch
            >>> model = ca3d_tiny(num_classes=5).eval()
            >>> model.encode_clip(torch.zeros(1, 32, 8, 4, 4)).shape
            torch.Size([1, 64, 4, 2, 2])
        """
        return self._run(features, self._clip_start, len(self.layers))

    def classify(self, features: Tensor) -> Tensor:
        """Head and classifier.

        Args:
            features: (B, C, T, h, w) from `encode_clip`.

        Returns:
            Logits, (B, num_classes).

        Raises:
            ValueError: a single clip in training mode.

        Example:
            >>> import torch
            >>> ca3d_tiny(num_classes=5).eval().classify(torch.zeros(1, 64, 4, 2, 2)).shape
            torch.Size([1, 5])
        """
        logits: Tensor = self.classifier(self.head(features))
        return logits

    def _run(self, x: Tensor, start: int, stop: int) -> Tensor:
        for layer in list(self.layers.values())[start:stop]:
            x = layer(x)
        return x

    def _check_clip(self, clip: Tensor) -> None:
        if not isinstance(clip, Tensor) or not clip.is_floating_point():
            kind = clip.dtype if isinstance(clip, Tensor) else type(clip).__name__
            raise TypeError(f"clip must be a floating-point tensor (normalised), got {kind}")
        if clip.dim() != 5 or clip.shape[1] != 3 or min(clip.shape) < 1:
            raise ValueError(
                "clip must have the shape (batch, 3, frames, height, width) without empty "
                f"dimensions, got {tuple(clip.shape)}"
            )
        own = self.classifier.weight.dtype
        if clip.dtype != own and not torch.is_autocast_enabled(clip.device.type):
            raise TypeError(f"clip must have the model's dtype {own}, got {clip.dtype}")


def _layers(config: CA3DOptions) -> dict[str, nn.Module]:
    """The parts of a model in order, by name."""
    choices = config.choices()
    norm = {"norm_eps": config.norm_eps, "norm_momentum": config.norm_momentum}
    layers: dict[str, nn.Module] = {}
    channels, frames = 3, config.frames
    for i, width in enumerate(config.widths):
        number, heads = i + 1, config.temporal_heads[i]
        if heads:
            frames = TimePool.frames_after(frames)
        if heads and choices.pool == "paper":
            layers[f"pool{number}"] = TimePool()
        layers[f"spatial{number}"] = SpatialBlock(
            channels,
            width,
            config.spatial_depths[i],
            kernel=3 if i else config.stem_kernel,
            heads=config.spatial_heads[i],
            **norm,
        )
        if heads:
            if choices.pool == "published":
                layers[f"pool{number}"] = TimePool()
            if "position" not in layers:
                layers["position"] = PositionalTable(width, frames)
            table = None
            if choices.keys == "published":
                order = presets.head_order(config.spatial_heads[i], heads)
                table = published_key_table(heads, config.kernel_size, order)
            layers[f"temporal{number}"] = TemporalBlock(
                width,
                heads,
                config.temporal_depths[i],
                kernel_size=config.kernel_size,
                edge=choices.edge,
                scale=heads / width if choices.scale == "linear" else None,
                key_table=table,
                dense_qkv=config.dense_qkv,
                **norm,
            )
        channels = width
    return layers


@register("ca3d")
def ca3d(num_classes: int, **options: Any) -> CA3D:
    """CA3D as in the paper: 6.95 million parameters at 101 classes.

    Args:
        num_classes: number of classes.
        **options: fields of `ca3d.models.options.CA3DOptions`, such as ``preset="published"``.

    Returns:
        The model, in training mode.

    Raises:
        ValueError, TypeError: see `ca3d.models.options.CA3DOptions`.

    Example:
        >>> sum(p.numel() for p in ca3d(num_classes=101).parameters())
        6950891
    """
    return CA3D(num_classes, "ca3d", **options)


@register("ca3d_l")
def ca3d_l(num_classes: int, **options: Any) -> CA3D:
    """CA3D-L: residual columns of depth 4 in block 3 and 8 in block 4, 17.8 million parameters.

    Args:
        num_classes: number of classes.
        **options: fields of `ca3d.models.options.CA3DOptions`.

    Returns:
        The model, in training mode.

    Raises:
        ValueError, TypeError: see `ca3d.models.options.CA3DOptions`.

    Example:
        >>> sum(p.numel() for p in ca3d_l(num_classes=101).parameters())
        17807339
    """
    depths = {"spatial_depths": (2, 2, 4, 8), "temporal_depths": (0, 0, 4, 8)}
    return CA3D(num_classes, "ca3d_l", **{**depths, **options})


@register("ca3d_tiny")
def ca3d_tiny(num_classes: int, **options: Any) -> CA3D:
    """A CA3D of 8 to 64 channels for clips of 32 to 64 pixels, trained on a CPU in minutes.

    Args:
        num_classes: number of classes.
        **options: fields of `ca3d.models.options.CA3DOptions`.

    Returns:
        The model, in training mode.

    Raises:
        ValueError, TypeError: see `ca3d.models.options.CA3DOptions`.

    Example:
        >>> ca3d_tiny(num_classes=5).classifier
        Linear(in_features=64, out_features=5, bias=True)
    """
    return CA3D(num_classes, "ca3d_tiny", **{"widths": (8, 16, 32, 64), **options})
