"""Names, shapes and channel order of the published code's state dicts, in terms of our models.

There, head h owns the channels ``h, h + H, h + 2H, ...``; here, heads are contiguous groups. Every
channel axis is therefore permuted once: outputs and inputs of convolutions, normalisations, the
classifier's columns. Rows of the positional table are head-major there already. Where a stage with
4 heads feeds one with 8, the same flat channels are read modulo 8 (see `presets.head_order`).
Values that the published modules store twice under different names are dropped.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ca3d.models import presets
from ca3d.models.blocks import (
    PositionalTable,
    ResidualBlock,
    ResidualColumn,
    SpatialBlock,
    TemporalBlock,
)
from ca3d.models.model import CA3D

__all__ = ["Entry", "canonical_name", "detect", "entries", "from_published"]

_ALIASES = (
    # A temporal half and the first block of a column are registered in a list as well.
    (re.compile(r"^(layer_list\.\d+)\.layer_list\.0\."), r"\1.block."),
    (re.compile(r"\.proj\.layer_list\.0\."), ".proj.block."),
    (re.compile(r"\.conv1\."), ".conv."),
)
_DEPTHS = {"ca3d": ((2, 2, 2, 2), (2, 2)), "ca3d_l": ((2, 2, 4, 8), (4, 8))}
_LISTED = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a model and where it comes from.

    Attributes:
        ours: its name in our state dict.
        published: its name in the published one.
        shape: its shape there.
        convert: brings it into our order and shape.
    """

    ours: str
    published: str
    shape: tuple[int, ...]
    convert: Callable[[Tensor], Tensor]


def canonical_name(name: str) -> str:
    """The first of the names under which the published modules store a tensor.

    Example:
        >>> canonical_name("layer_list.6.layer_list.0.proj.layer_list.0.conv1.bias")
        'layer_list.6.block.proj.block.conv.bias'
    """
    for pattern, replacement in _ALIASES:
        name = pattern.sub(replacement, name)
    return name


def entries(model: CA3D) -> list[Entry]:
    """All tensors of a model with their published names, shapes and conversions.

    Args:
        model: a model with per-head projections.

    Returns:
        One entry for each key of ``model.state_dict()``.

    Example:
        >>> from ca3d.models import ca3d
        >>> found = {entry.ours: entry for entry in entries(ca3d(101, preset="published"))}
        >>> found["layers.spatial4.conv.weight"].published
        'layer_list.7.conv.weight'
    """
    return list(_walk(model))


def _walk(model: CA3D) -> Iterator[Entry]:
    options = model.options
    order, index = torch.arange(3), 0
    for name, layer in model.layers.items():
        ours, theirs = f"layers.{name}", f"layer_list.{index}"
        if isinstance(layer, SpatialBlock):
            block = int(name.removeprefix("spatial")) - 1
            groups = options["spatial_heads"][block]
            heads = options["temporal_heads"][block] or groups
            leaving = _channel_order(options["widths"][block], groups, heads)
            yield from _norm(f"{ours}.input_norm", f"{theirs}.norm1.norm", order)
            yield from _conv(f"{ours}.conv", f"{theirs}.conv", layer.conv, order, leaving)
            yield from _norm(f"{ours}.norm", f"{theirs}.norm2.norm", leaving)
            yield from _column(f"{ours}.column", f"{theirs}.proj", layer.column, leaving)
            order = leaving
        elif isinstance(layer, PositionalTable):
            yield Entry(
                f"{ours}.weight", f"{theirs}.pos_embed", tuple(layer.weight.shape), _unchanged
            )
            index += 1  # a dropout follows there
        elif isinstance(layer, TemporalBlock):
            theirs = f"{theirs}.block"
            yield from _norm(f"{ours}.input_norm", f"{theirs}.norm1.norm", order)
            yield from _projection(f"{ours}.attention", f"{theirs}.attn.qkv", layer, order)
            yield from _norm(f"{ours}.norm", f"{theirs}.norm2.norm", order)
            yield from _column(f"{ours}.column", f"{theirs}.proj", layer.column, order)
        index += 1
    # The global average pool stands between the last half and the head's normalisation.
    yield from _norm("head.norm", f"layer_list.{index + 1}.norm", order)
    shape = tuple(model.classifier.weight.shape)
    yield Entry("classifier.weight", "clf.weight", shape, lambda t: t[:, order])
    yield Entry("classifier.bias", "clf.bias", shape[:1], _unchanged)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _channel_order(channels: int, groups: int, heads: int) -> Tensor:
    """Published channel that sits at each of our places, where `heads` heads read the channels."""
    places = torch.tensor(presets.head_order(groups, heads))
    return (places.unsqueeze(1) + heads * torch.arange(channels // heads)).flatten()


def _norm(ours: str, theirs: str, order: Tensor) -> Iterator[Entry]:
    for name in ("weight", "bias", "running_mean", "running_var"):
        yield Entry(f"{ours}.{name}", f"{theirs}.{name}", (len(order),), lambda t: t[order])
    name = "num_batches_tracked"
    yield Entry(f"{ours}.{name}", f"{theirs}.{name}", (), _unchanged)


def _conv(
    ours: str, theirs: str, conv: nn.Conv2d, entering: Tensor, leaving: Tensor
) -> Iterator[Entry]:
    groups, (outputs, inputs, *kernel) = conv.groups, conv.weight.shape
    # Which of its head's inputs each of our filters' inputs is, there.
    inner = (entering // groups).view(groups, inputs).repeat_interleave(outputs // groups, 0)

    def weight(tensor: Tensor) -> Tensor:
        filters = tensor.transpose(0, 1).reshape(outputs, inputs, *kernel)[leaving]
        return filters[torch.arange(outputs).unsqueeze(1), inner]

    shape = (groups, outputs // groups)
    flat = inputs * kernel[0] * kernel[1]
    yield Entry(f"{ours}.weight", f"{theirs}.weight", (*shape, flat), weight)
    yield Entry(f"{ours}.bias", f"{theirs}.bias", shape, lambda t: t.t().flatten()[leaving])


def _column(ours: str, theirs: str, column: ResidualColumn, order: Tensor) -> Iterator[Entry]:
    for i, block in enumerate(column):
        assert isinstance(block, ResidualBlock)
        source = f"{theirs}.layer_list.{i}" if i else f"{theirs}.block"
        yield from _conv(f"{ours}.{i}.conv1", f"{source}.conv", block.conv1, order, order)
        yield from _norm(f"{ours}.{i}.norm1", f"{source}.norm1.norm", order)
        yield from _conv(f"{ours}.{i}.conv2", f"{source}.conv2", block.conv2, order, order)
        yield from _norm(f"{ours}.{i}.norm2", f"{source}.norm2.norm", order)


def _projection(ours: str, theirs: str, layer: TemporalBlock, order: Tensor) -> Iterator[Entry]:
    weight: Tensor = layer.attention.qkv_weight
    heads, width = weight.shape[0], weight.shape[-1]
    if weight.dim() != 3:
        raise ValueError("the published models have one projection per head: dense_qkv=False")
    places = order[::width] % heads
    for name, shape in (("weight", (heads, 3 * width, width)), ("bias", (heads, 3 * width))):
        yield Entry(f"{ours}.qkv_{name}", f"{theirs}.{name}", shape, lambda t: t[places])


def detect(state: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Reads from a published state dict's keys and shapes which model it is.

    Args:
        state: published names to tensors.

    Returns:
        Name and options for `ca3d.models.create`, with ``preset="published"``.

    Raises:
        ValueError: it is none of the models.

    Example:
        >>> detect({})
        Traceback (most recent call last):
        ValueError: no published CA3D model: clf.weight and layer_list.4.pos_embed are missing
    """
    shapes = {name: tuple(value.shape) for name, value in state.items() if hasattr(value, "shape")}
    missing = [
        name for name in ("clf.weight", "layer_list.4.pos_embed") if len(shapes.get(name, ())) != 2
    ]
    if missing:
        raise ValueError(f"no published CA3D model: {' and '.join(missing)} are missing")
    paper_pool = "layer_list.3.conv.weight" in shapes
    spatial = (0, 1, 3, 8) if paper_pool else (0, 1, 2, 7)
    columns = [f"layer_list.{i}.proj" for i in spatial]
    columns += [f"layer_list.{i}.block.proj" for i in (6, 9)]
    depths = tuple(_depth(shapes, column) for column in columns)
    for name, (spatial_depths, temporal_depths) in _DEPTHS.items():
        if depths == spatial_depths + temporal_depths:
            options: dict[str, Any] = {
                "num_classes": shapes["clf.weight"][0],
                "frames": 2 * shapes["layer_list.4.pos_embed"][1],
                "preset": "published",
            }
            if paper_pool:
                options["pool"] = "paper"
            return name, options
    raise ValueError(
        f"no published CA3D model: columns of depth {depths[:4]} (spatial) and {depths[4:]} "
        f"(temporal), known are {_DEPTHS}"
    )


def _depth(shapes: Mapping[str, Any], column: str) -> int:
    if f"{column}.block.conv.weight" not in shapes:
        return 0
    depth = 1
    while f"{column}.layer_list.{depth}.conv.weight" in shapes:
        depth += 1
    return depth


def from_published(state: Mapping[str, Any], model: CA3D) -> dict[str, Tensor]:
    """Converts a published state dict to one that a model loads strictly.

    Args:
        state: published names to tensors; second names of a tensor and pre-parameters
            (``pre_params.*``) may be there, and are checked and dropped.
        model: the model to convert for, such as ``create(name, **options)`` of `detect`.

    Returns:
        Our names to new tensors, in the dtypes of the input.

    Raises:
        ValueError: names are missing or unknown, shapes differ, a tensor isn't a dense one of
            floating point, or two names of one tensor hold different values. All of them are
            listed; nothing is converted.

    Example:
        >>> from ca3d.models import ca3d_tiny
        >>> from_published({}, ca3d_tiny(5, preset="published"))    # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: 248 missing (layer_list.0.norm1.norm.weight, ...
    """
    wanted = {entry.published: entry for entry in entries(model)}
    pre_parameters = {f"pre_params.{name.replace('.', '/')}": name for name in wanted}
    found: dict[str, Tensor] = {}
    unexpected, misshaped, contradicting, of_another_kind = [], [], [], []
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    # First names come first, so that a second name is compared with the first.
    for name, value in sorted(state.items(), key=lambda item: canonical_name(item[0]) != item[0]):
        target = pre_parameters.get(name, canonical_name(name))
        entry = wanted.get(target)
        if entry is None or not isinstance(value, Tensor):
            unexpected.append(name)
        elif tuple(value.shape) != entry.shape:
            misshaped.append(f"{name}: {tuple(value.shape)} instead of {entry.shape}")
        elif (
            value.layout != torch.strided
            or value.is_meta
            or value.is_quantized
            or not (value.is_floating_point() or target in counters)
        ):
            of_another_kind.append(f"{name}: {value.dtype}, {value.layout}, {value.device}")
        elif name in pre_parameters:
            continue
        elif target not in found:
            found[target] = value
        elif not torch.equal(found[target], value):
            contradicting.append(f"{name} differs from {target}")
    broken = {text.split(":")[0] for text in misshaped + of_another_kind}
    missing = [name for name in wanted if name not in found and name not in broken]
    faults = {
        "missing": missing,
        "unexpected": unexpected,
        "of the wrong shape": misshaped,
        "no dense floating-point tensor": of_another_kind,
        "contradicting": contradicting,
    }
    if any(faults.values()):
        raise ValueError("; ".join(_listed(kind, items) for kind, items in faults.items() if items))
    return {
        entry.ours: entry.convert(found[entry.published].detach()).clone()
        for entry in wanted.values()
    }


def _listed(kind: str, items: list[str]) -> str:
    shown = ", ".join(items[:_LISTED])
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return f"{len(items)} {kind} ({shown}{more})"
