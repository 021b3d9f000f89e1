"""The engine under CA3D for other convolutional networks, so that speeds compare architectures.

CA3D keeps its clips channels-last, convolves in two dimensions on free views of them, and
normalises by the kernels of `ca3d_kernels`. `same_engine` does that to any model of 3-D
convolutions, and `folded` spares it the normalisations in inference. Networks of tokens have
nothing to gain from it.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ca3d.models.layout import as_clip, as_frames, as_lines
from ca3d.models.norm import BatchNorm

__all__ = ["ClipConv", "ClipNorm", "folded", "is_convolutional", "same_engine"]


class ClipConv(nn.Conv3d):
    """`torch.nn.Conv3d` that works in two dimensions where its kernel is flat: on frames if it sees
    one frame at a time, on lines of frames if it sees one pixel at a time.

    On a CPU the 2-D convolution of a channels-last view is the faster one: a depthwise (5, 1, 1)
    took a ninth of the time of torch's 3-D one (forward and backward, 2x64x16x28x28, float32, AMD
    EPYC, one thread, 2026-11-27, beside other work).

    Example:
        >>> ClipConv(3, 4, (1, 3, 3))(torch.randn(2, 3, 4, 8, 8)).shape
        torch.Size([2, 4, 4, 6, 6])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolves (B, C, T, H, W)."""
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            return super().forward(input)
        options = zip(self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        time, height, width = (tuple(option) for option in options)
        flat = (1, 1, 0, 1)  # of a dimension whose places stay apart
        strides, paddings, dilations = self.stride, self.padding, self.dilation
        if time == flat:
            frames = F.conv2d(
                as_frames(input), self.weight.squeeze(2), self.bias,
                strides[1:], paddings[1:], dilations[1:], self.groups,
            )  # fmt: skip
            return as_clip(frames, len(input))
        if height == width == flat:
            lines = F.conv2d(
                as_lines(input), self.weight.flatten(3), self.bias,
                (strides[0], 1), (paddings[0], 0), (dilations[0], 1), self.groups,
            )  # fmt: skip
            return lines.unflatten(3, input.shape[3:])
        return super().forward(input)


class ClipNorm(BatchNorm):
    """`torch.nn.BatchNorm3d` by the kernels of `ca3d_kernels`, where they take the tensor.

    Example:
        >>> ClipNorm(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """Normalises (B, C, T, H, W); `relu` as in `BatchNorm`."""
        return as_clip(super().forward(as_frames(input), relu), len(input))


def is_convolutional(model: nn.Module) -> bool:
    """Whether a model is one of convolutions and batch normalisations.

    Args:
        model: any model of `ca3d.models`.

    Example:
        >>> from ca3d.models import create
        >>> is_convolutional(create("ca3d_tiny", 5))
        True
    """
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def same_engine(model: nn.Module) -> nn.Module:
    """Brings a model of 3-D convolutions to the layout, convolutions and normalisation of CA3D.

    Args:
        model: it is changed in place; its parameters, buffers and their names stay. CA3D itself is
            left as it is.

    Returns:
        The model. It wants clips in `torch.channels_last_3d`.

    Example:
        >>> from ca3d.models import create
        >>> same_engine(create("r3d_tiny", 5)).features.stem[1].__class__.__name__
        'ClipNorm'
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv3d):
                setattr(parent, name, _like(ClipConv, layer))
            elif type(layer) is nn.BatchNorm3d:
                setattr(parent, name, _like(ClipNorm, layer))
    return _channels_last(model)


def _like(kind: type[nn.Module], layer: nn.Module) -> nn.Module:
    """A layer of another class with all that this one has, parameters and hooks included."""
    ours = kind.__new__(kind)
    ours.__dict__.update(layer.__dict__)
    return ours


@torch.no_grad()
def folded(model: nn.Module) -> nn.Module:
    """A copy for inference whose convolutions do the normalisations that follow them directly.

    Args:
        model: it is not changed.

    Returns:
        The copy, in evaluation mode. A normalisation behind a ReLU, as in CA3D, stays.

    Example:
        >>> layer = nn.Sequential(nn.Conv3d(3, 4, 1, bias=False), nn.BatchNorm3d(4))
        >>> folded(layer)[1]
        Identity()
    """
    dtype = next(model.parameters()).dtype
    model = copy.deepcopy(model).eval().float()
    for sequence in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        before: tuple[nn.Sequential, str] | None = None
        for place, name, layer in _in_order(sequence):
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and before is not None:
                owner, key = before
                convolution = owner._modules[key]
                assert isinstance(convolution, nn.Conv3d)
                setattr(owner, key, fuse_conv_bn_eval(convolution, layer))
                setattr(place, name, nn.Identity())
            before = (place, name) if isinstance(layer, nn.Conv3d) else None
    return _channels_last(model.to(dtype))


def _channels_last(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Conv3d):
            layer.to(memory_format=torch.channels_last_3d)
    return model


def _in_order(sequence: nn.Sequential) -> list[tuple[nn.Sequential, str, nn.Module]]:
    """The layers of nested sequences in the order of their execution."""
    found: list[tuple[nn.Sequential, str, nn.Module]] = []
    for name, layer in sequence.named_children():
        found += _in_order(layer) if isinstance(layer, nn.Sequential) else [(sequence, name, layer)]
    return found
