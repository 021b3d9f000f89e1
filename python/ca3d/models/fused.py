"""CA3D for inference: normalisations folded into what stands beside them, dropout gone.

CA3D normalises after the ReLU (`ca3d.models.blocks`), and the next convolution pads with zeros
after that. So the scale of a normalisation goes into the weights in front of it, its shift is added
behind the ReLU, and both are exact at the borders of an image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca3d.models.blocks import (
    Head,
    PositionalTable,
    ResidualBlock,
    ResidualColumn,
    SpatialBlock,
    TemporalBlock,
)
from ca3d.models.layout import as_clip, as_frames, as_lines
from ca3d.models.model import CA3D
from ca3d.models.time_pool import TimePool
from ca3d_kernels import LocalTemporalAttention, folded_conv, temporal_block

__all__ = ["FoldedConv", "FusedCA3D", "Scaling"]


class Scaling:
    """``x * scale + shift``, channel by channel, in float64: a normalisation in evaluation.

    Args:
        scale, shift: (C,).

    Example:
        >>> Scaling.of(nn.BatchNorm2d(2, eps=0)).scale
        tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self.scale, self.shift = scale, shift

    @classmethod
    def of(cls, norm: nn.Module) -> "Scaling":
        """The scaling that a batch normalisation with fixed statistics is.

        Args:
            norm: the normalisation; one without affine parameters is taken with ones and zeros.

        Raises:
            ValueError: it keeps no running statistics.

        Example:
            >>> Scaling.of(nn.BatchNorm1d(3)).shift.tolist()
            [0.0, 0.0, 0.0]
        """
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(
                "fuse needs running statistics, got a batch normalisation with "
                "track_running_stats=False"
            )
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
        return cls(scale, shift)


class FoldedConv(nn.Module):
    """Convolution, ReLU and the normalisation behind it: `ca3d_kernels.folded_conv` as a layer.

    Args:
        conv: the convolution.
        norm: the normalisation that follows its ReLU.
        output: a scaling of the result, the residual included, or None.
        residual: whether a residual is added.
        portable: whether to use torch's own operators only.

    Attributes:
        weight, bias: of the convolution, times the magnitude of the normalisation's scale.
        scale: signs of that scale, or None if all are positive.
        shift: what is added behind the ReLU.
        residual_scale: factor of the residual, or None for 1.

    Example:
        >>> conv, norm, x = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8).eval(), torch.randn(1, 4, 5, 5)
        >>> with torch.no_grad():
        ...     expected, found = norm(conv(x).relu()), FoldedConv(conv, norm)(x)
        >>> torch.allclose(found, expected, atol=1e-6)
        True
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.Module,
        output: Scaling | None = None,
        *,
        residual: bool = False,
        portable: bool = False,
    ) -> None:
        super().__init__()
        scaling = Scaling.of(norm)
        scale, shift = scaling.scale, scaling.shift
        if output is not None:
            scale, shift = scale * output.scale, shift * output.scale + output.shift
        weight = conv.weight.detach()
        magnitude, negative = scale.abs(), scale < 0
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach()
        folded = (weight.double() * magnitude[:, None, None, None]).to(weight)
        self.weight = _constant(folded.contiguous(memory_format=torch.channels_last))
        self.bias = _constant((bias.double() * magnitude).to(weight))
        self.shift = _constant(shift.to(weight))
        self.scale = _constant(1 - 2 * negative.to(weight)) if negative.any() else None
        self.residual_scale = None
        if residual and output is not None:
            self.residual_scale = _constant(output.scale.to(weight))
        assert not isinstance(conv.padding, str)
        self.stride, self.padding, self.groups = conv.stride, conv.padding, conv.groups
        self.portable = portable

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Maps images (N, C, H, W), with the residual of the result's shape."""
        if self.portable:
            return self._by_torch(x, residual)
        return folded_conv(
            x,
            self.weight,
            self.bias,
            self.shift,
            self.scale,
            residual,
            self.residual_scale,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
        )

    def _by_torch(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
        y = F.relu(y)
        if self.scale is not None:
            y = y * self.scale[:, None, None]
        y = y + self.shift[:, None, None]
        if residual is None:
            return y
        if self.residual_scale is not None:
            residual = residual * self.residual_scale[:, None, None]
        return y + residual

    def extra_repr(self) -> str:
        """The shape of the convolution."""
        outputs, inputs, *kernel = self.weight.shape
        return f"{inputs * self.groups}, {outputs}, kernel_size={tuple(kernel)}"


class _FoldedColumn(nn.Module):
    """A residual column, with a scaling of its result."""

    def __init__(self, column: ResidualColumn, output: Scaling | None, portable: bool) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for i, block in enumerate(column):
            assert isinstance(block, ResidualBlock)
            last = output if i + 1 == len(column) else None
            steps.append(FoldedConv(block.conv1, block.norm1, portable=portable))
            steps.append(
                FoldedConv(block.conv2, block.norm2, last, residual=True, portable=portable)
            )
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.steps[::2], self.steps[1::2], strict=True):
            x = second(first(x), x)
        return x


class _FoldedSpatialBlock(nn.Module):
    """The spatial half of a CAST block. `output` is what the next layer would do to the result."""

    def __init__(
        self,
        block: SpatialBlock,
        scales_input: bool,
        output: Scaling | None,
        portable: bool,
    ) -> None:
        super().__init__()
        self.input_scale = self.input_shift = None
        if scales_input:
            scaling, like = Scaling.of(block.input_norm), block.conv.weight
            self.input_scale = _constant(scaling.scale.to(like)[:, None, None])
            self.input_shift = _constant(scaling.shift.to(like)[:, None, None])
        of_conv = None if len(block.column) else output
        self.conv = FoldedConv(block.conv, block.norm, of_conv, portable=portable)
        self.column = _FoldedColumn(block.column, output, portable)

    def forward(self, clip: Tensor) -> Tensor:
        return as_clip(self.images(as_frames(clip)), clip.shape[0])

    def images(self, frames: Tensor) -> Tensor:
        if self.input_scale is not None:
            assert self.input_shift is not None
            frames = torch.addcmul(self.input_shift, frames, self.input_scale)
        out: Tensor = self.column(self.conv(frames))
        return out


class _FoldedTemporalBlock(nn.Module):
    """The temporal half of a CAST block, the positional table in front of it included.

    It is one op; a projection across heads has no kernel, and `portable` leaves torch's operators.
    """

    def __init__(
        self, block: TemporalBlock, position: PositionalTable | None, portable: bool
    ) -> None:
        super().__init__()
        before, after = Scaling.of(block.input_norm), Scaling.of(block.norm)
        table = None if position is None else position.weight.detach().double()
        self.frames = None if table is None else table.shape[1]
        attention = block.attention.fold(before.scale, before.shift, table)
        shift = after.shift[:, None]
        if table is not None:
            shift = shift + after.scale[:, None] * table
        if portable or attention.dense_qkv:
            self.steps: nn.Module = _TemporalSteps(
                attention, after.scale, shift, block.column, portable
            )
        else:
            self.steps = _TemporalKernel(attention, after.scale, shift, block.column)

    def forward(self, clip: Tensor) -> Tensor:
        if self.frames is not None and clip.shape[2] != self.frames:
            raise ValueError(
                f"the positional table holds {self.frames} frames, got {clip.shape[2]}; "
                "build the model with another number of frames"
            )
        return self.steps(as_lines(clip)).unflatten(3, clip.shape[3:])


class _TemporalSteps(nn.Module):
    """The temporal half as attention and convolutions; shift is (C, T) or (C, 1)."""

    def __init__(
        self,
        attention: LocalTemporalAttention,
        scale: Tensor,
        shift: Tensor,
        column: ResidualColumn,
        portable: bool,
    ) -> None:
        super().__init__()
        like = attention.qkv_weight
        self.attention = attention
        self.scale = _constant(scale.to(like)[:, None, None])
        self.shift = _constant(shift.to(like)[:, :, None])
        self.column = _FoldedColumn(column, None, portable)

    def forward(self, lines: Tensor) -> Tensor:
        lines = lines + as_lines(self.attention(lines.unsqueeze(4)))
        return self.column(torch.addcmul(self.shift, lines, self.scale))


class _TemporalKernel(nn.Module):
    """The temporal half as `ca3d_kernels.temporal_block`; shift is (C, T) or (C, 1)."""

    def __init__(
        self,
        attention: LocalTemporalAttention,
        scale: Tensor,
        shift: Tensor,
        column: ResidualColumn,
    ) -> None:
        super().__init__()
        assert attention.qkv_bias is not None
        like, heads = attention.qkv_weight, attention.heads
        self.qkv_weight = _constant(like.transpose(1, 2).contiguous())
        bias = attention.qkv_bias
        self.qkv_bias = _constant(bias if bias.dim() == 3 else bias.unsqueeze(1))
        self.norm_scale = _constant(scale.to(like).unflatten(0, (heads, -1)))
        self.norm_shift = _constant(
            shift.to(like).unflatten(0, (heads, -1)).transpose(1, 2).contiguous()
        )
        weights, rows = [], []
        for block in column:
            assert isinstance(block, ResidualBlock)
            for conv, norm in ((block.conv1, block.norm1), (block.conv2, block.norm2)):
                assert conv.bias is not None
                # (heads, out, in, 3) to (heads, 3, in, out)
                taps = conv.weight.detach().squeeze(3).unflatten(0, (heads, -1))
                weights.append(taps.permute(0, 3, 2, 1).flatten(1, 2))
                scaling = Scaling.of(norm)
                rows.append(torch.stack([conv.bias.double(), scaling.scale, scaling.shift]))
        width = like.shape[-1]
        self.column_weight = _constant(
            torch.stack(weights) if weights else like.new_zeros(0, heads, 3 * width, width)
        )
        of_steps = torch.stack(rows, 1) if rows else like.new_zeros(3, 0, heads * width)
        of_steps = of_steps.to(like).unflatten(2, (heads, width))
        self.column_bias, self.column_scale, self.column_shift = map(_constant, of_steps)
        self.options = attention.options

    def forward(self, lines: Tensor) -> Tensor:
        frames = lines.shape[2]
        pixels = temporal_block(
            lines.permute(0, 2, 3, 1),
            self.qkv_weight,
            _for_frames(self.qkv_bias, frames),
            self.norm_scale,
            _for_frames(self.norm_shift, frames),
            self.column_weight,
            self.column_bias,
            self.column_scale,
            self.column_shift,
            **self.options,
        )
        return pixels.permute(0, 3, 1, 2)


def _for_frames(x: Tensor, frames: int) -> Tensor:
    """(heads, T, n), or (heads, 1, n) for all frames, as (heads, T, n)."""
    return x if x.shape[1] == frames else x.expand(-1, frames, -1)


class _FoldedHead(Head):
    """Mean over time and space; what else a head does is part of the classifier."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def check_batch(self, batch: int) -> None:
        """Any batch will do."""

    def forward(self, clip: Tensor) -> Tensor:
        return clip.movedim(1, -1).mean((1, 2, 3))


class FusedCA3D(CA3D):
    """A CA3D model for inference, made by `ca3d.fuse`.

    It has the methods of `ca3d.models.CA3D`. What `encode_frames`, `encode_pairs` and `encode_clip`
    return is for one another, and not the same as the original's: only the logits are. Its
    parameters need no gradient and are named otherwise: save the original.

    Args:
        model: the original; it is not changed, and shares no memory with this one.
        portable: whether to use torch's own operators only.

    Raises:
        TypeError: a part of the model was replaced by another kind of module.
        ValueError: a normalisation keeps no running statistics.

    Example:
        >>> from ca3d.models import ca3d_tiny
        >>> model, clip = ca3d_tiny(num_classes=5).eval(), torch.randn(1, 3, 16, 32, 32)
        >>> with torch.no_grad():
        ...     torch.allclose(FusedCA3D(model)(clip), model(clip), atol=1e-5)
        True
    """

    def __init__(self, model: CA3D, *, portable: bool = False) -> None:
        nn.Module.__init__(self)
        if isinstance(model, FusedCA3D):
            raise TypeError("the model is fused already")
        self.name, self.options, self.frames = model.name, model.options, model.frames
        self.portable = portable
        self._clip_start, self._pair_start = model._clip_start, model._pair_start
        self.layers = nn.ModuleDict(_folded_layers(model, portable))
        self.head = _FoldedHead()
        self.classifier = _folded_classifier(model)
        super().train(False)

    def train(self, mode: bool = True) -> "FusedCA3D":
        """Refuses training: the model has neither batch statistics nor gradients.

        Raises:
            RuntimeError: `mode` is True.

        Example:
            >>> from ca3d.models import ca3d_tiny
            >>> FusedCA3D(ca3d_tiny(num_classes=5)).train()
            Traceback (most recent call last):
            RuntimeError: a fused model is for inference; train the original and fuse it again
        """
        if mode:
            raise RuntimeError(
                "a fused model is for inference; train the original and fuse it again"
            )
        return super().train(False)


def _folded_layers(model: CA3D, portable: bool) -> dict[str, nn.Module]:
    items = list(model.layers.items())
    layers: dict[str, nn.Module] = {}
    position: PositionalTable | None = None
    for i, (name, layer) in enumerate(items):
        before = items[i - 1][1] if i else None
        after = items[i + 1][1] if i + 1 < len(items) else None
        if type(layer) is SpatialBlock:
            # Between two spatial halves the second's input normalisation is done by the first.
            output = Scaling.of(after.input_norm) if type(after) is SpatialBlock else None
            layers[name] = _FoldedSpatialBlock(
                layer, type(before) is not SpatialBlock, output, portable
            )
        elif type(layer) is TimePool:
            layers[name] = TimePool()
        elif type(layer) is PositionalTable and type(after) is TemporalBlock:
            position = layer
            layers[name] = nn.Identity()  # keeps the places of what follows
        elif type(layer) is TemporalBlock:
            layers[name] = _FoldedTemporalBlock(layer, position, portable)
            position = None
        else:
            raise TypeError(f"fuse doesn't know layers.{name} of type {type(layer).__name__}")
    return layers


def _folded_classifier(model: CA3D) -> nn.Linear:
    if type(model.head) is not Head:
        raise TypeError(f"fuse doesn't know a head of type {type(model.head).__name__}")
    if not isinstance(model.classifier, nn.Linear):
        kind = type(model.classifier).__name__
        raise TypeError(f"fuse needs a linear classifier, got {kind}")
    scaling, weight = Scaling.of(model.head.norm), model.classifier.weight.detach()
    bias = weight.double() @ scaling.shift
    if model.classifier.bias is not None:
        bias = bias + model.classifier.bias.detach().double()
    with torch.device("meta"):
        classifier = nn.Linear(weight.shape[1], weight.shape[0])
    classifier.weight = _constant((weight.double() * scaling.scale).to(weight))
    classifier.bias = _constant(bias.to(weight))
    return classifier


def _constant(values: Tensor) -> nn.Parameter:
    values = values.clone() if values.is_inference() else values.detach()
    return nn.Parameter(values, requires_grad=False)
