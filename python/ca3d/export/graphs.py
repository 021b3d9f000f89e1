"""CA3D as graphs for other runtimes: torch's own operators, at most four dimensions, no state.

Everything works on one clip as a batch of images (frames, C, h, w), which is also how a host has
its frames. `Clip` is the whole model; `FrameEncoder` and `StreamHead` are its two parts for exact
streaming (`ca3d.streaming`), whose state the host keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ca3d.models.fused import FusedCA3D
from ca3d.models.time_pool import TimePool

__all__ = ["AnyClip", "Clip", "FrameEncoder", "StreamHead", "graphs_of"]


class Clip(nn.Module):
    """The whole model.

    Args:
        model: made by ``ca3d.fuse(model, portable=True)``.

    Example:
        >>> import ca3d
        >>> from ca3d.models import ca3d_tiny
        >>> Clip(ca3d.fuse(ca3d_tiny(num_classes=5), portable=True))(
        ...     torch.zeros(16, 3, 32, 32)
        ... ).shape
        torch.Size([1, 5])
    """

    def __init__(self, model: FusedCA3D) -> None:
        super().__init__()
        frames, pairs, clip = _parts(model)
        pool = [_Pool()] if model.frames_per_unit > 1 else []
        self.layers = nn.Sequential(*frames, *pool, *pairs, *clip)
        self.classifier = model.classifier

    def forward(self, frames: Tensor) -> Tensor:
        """Maps normalised frames (T, 3, H, W) to logits (1, classes), float32."""
        x = self.layers(frames.to(self.classifier.weight.dtype))
        logits: Tensor = self.classifier(x.mean((0, 2, 3)).unsqueeze(0))
        return logits.float()


class FrameEncoder(nn.Module):
    """The part of the model that sees single frames and pairs of frames: 94 % of its work.

    With `pairs`, for windows that all start at even frames, it takes two new frames and makes one
    unit of them. Otherwise it takes one new frame and the features of the one before; the unit is
    that of the two. Without time pool it takes one frame.

    Args:
        model: made by ``ca3d.fuse(model, portable=True)``.
        pairs: see above.
    """

    def __init__(self, model: FusedCA3D, pairs: bool) -> None:
        super().__init__()
        frames, units, _ = _parts(model)
        self.frames, self.units = nn.Sequential(*frames), nn.Sequential(*units)
        self.keeps_last = model.frames_per_unit > 1 and not pairs
        self.new_frames = model.frames_per_unit if pairs else 1
        self.dtype = model.classifier.weight.dtype

    def forward(self, frames: Tensor, last: Tensor | None = None) -> tuple[Tensor, ...]:
        """Encodes new frames.

        Args:
            frames: (1 or 2, 3, H, W), normalised, float32.
            last: (1, C, h, w), what the call before returned second; zeros for the first frame.

        Returns:
            The unit (1, C', h', w'); with `last` also the features of the new frame.
        """
        x = self.frames(frames.to(self.dtype))
        if last is None:
            y = torch.maximum(x[0:1], x[1:2]) if self.new_frames == 2 else x
            return (self.units(y),)
        return self.units(torch.maximum(last, x)), x


class StreamHead(nn.Module):
    """The part of the model that needs a whole window.

    Args:
        model: made by ``ca3d.fuse(model, portable=True)``.
    """

    def __init__(self, model: FusedCA3D) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_parts(model)[2])
        self.classifier = model.classifier

    def forward(self, units: Tensor) -> Tensor:
        """Maps the units of a window in order of time, (T', C', h', w'), to logits (1, classes)."""
        x = self.layers(units).mean((0, 2, 3)).unsqueeze(0)
        logits: Tensor = self.classifier(x)
        return logits.float()


class AnyClip(nn.Module):
    """Another model than CA3D, with `Clip`'s input; its own tensors may have more dimensions.

    Args:
        model: maps (1, 3, T, H, W) to logits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor) -> Tensor:
        """Maps normalised frames (T, 3, H, W) to logits (1, classes), float32."""
        like = next(self.model.parameters())
        logits: Tensor = self.model(frames.to(like.dtype).transpose(0, 1).unsqueeze(0))
        return logits.float()


def graphs_of(
    model: FusedCA3D, size: int, stride: int | None = None
) -> dict[str, tuple[nn.Module, dict[str, Tensor], list[str]]]:
    """Everything that is exported of a model.

    Args:
        model: made by ``ca3d.fuse(model, portable=True)``.
        size: height and width of the frames.
        stride: frames from one window of a stream to the next; None leaves the stream out.

    Returns:
        By the name of the graph, ``"clip"``, ``"encoder"``, ``"head"``: the module, an example of
        each input by its name, and the names of the outputs.

    Example:
        >>> import ca3d
        >>> from ca3d.models import ca3d_tiny
        >>> graphs = graphs_of(ca3d.fuse(ca3d_tiny(num_classes=5), portable=True), 32, stride=1)
        >>> {name: list(inputs) for name, (_, inputs, _) in graphs.items()}
        {'clip': ['frames'], 'encoder': ['frames', 'last'], 'head': ['units']}
    """
    frames = torch.zeros(model.frames, 3, size, size)
    found: dict[str, tuple[nn.Module, dict[str, Tensor], list[str]]] = {
        "clip": (Clip(model), {"frames": frames}, ["logits"])
    }
    if stride is not None:
        encoder = FrameEncoder(model, pairs=stride % model.frames_per_unit == 0)
        inputs, outputs = {"frames": frames[: encoder.new_frames]}, ["unit"]
        if encoder.keeps_last:
            inputs["last"] = _blank(encoder.frames, frames[:1].to(encoder.dtype))
            outputs.append("last_out")
        found["encoder"] = (encoder, inputs, outputs)
        unit = _blank(encoder, *inputs.values())
        units = unit.new_zeros(model.frames // model.frames_per_unit, *unit.shape[1:])
        found["head"] = (StreamHead(model), {"units": units}, ["logits"])
    return {name: (module.eval(), *rest) for name, (module, *rest) in found.items()}  # type: ignore[misc]


def _blank(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Zeros like a module's (first) output, without computing it."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        result = module(*inputs)
    first = result[0] if isinstance(result, tuple) else result
    return torch.zeros(first.shape, dtype=first.dtype)


class _Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x[0::2], x[1::2])


class _Images(nn.Module):
    """A spatial half."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        images: Tensor = self.block.images(x)  # type: ignore[operator]
        return images


class _Lines(nn.Module):
    """A temporal half of one clip: pixels are lines of frames, (1, C, T, h * w)."""

    def __init__(self, parts: Any, frames: int) -> None:
        super().__init__()
        self.attention = parts.attention.portable(frames)
        self.scale, self.shift, self.column = parts.scale, parts.shift, parts.column

    def forward(self, x: Tensor) -> Tensor:
        lines = x.flatten(2).transpose(0, 1).unsqueeze(0)
        lines = lines + self.attention(lines)
        lines = self.column(lines * self.scale + self.shift)
        return lines.squeeze(0).transpose(0, 1).reshape(x.shape)


def _parts(model: FusedCA3D) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """The layers for images: of single frames, of units (without the pool), of the clip."""
    if not model.portable:
        raise ValueError("model must be fused with portable=True to be exported")
    parts: tuple[list[nn.Module], ...] = ([], [], [])
    frames = model.frames
    for place, layer in enumerate(model.layers.values()):
        part = parts[(place >= model._pair_start) + (place >= model._clip_start)]
        if isinstance(layer, TimePool):
            if place != model._pair_start and frames > 1:
                part.append(_Pool())
            frames = TimePool.frames_after(frames)
        elif hasattr(layer, "images"):
            part.append(_Images(layer))
        elif hasattr(layer, "steps"):
            part.append(_Lines(layer.steps, frames))
    return parts[0], parts[1], parts[2]
