"""Layout: one copy on entry at most, channels last in every part, forward and backward."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from ca3d.models import CA3D, ca3d_tiny
from ca3d.models.layout import as_clip, as_frames, as_lines, to_channels_last

# Operations that move or convert elements without computing anything.
MOVING = {"aten::clone", "aten::contiguous", "aten::copy_", "aten::_to_copy"}


def moved(model: CA3D, clip: torch.Tensor, backward: bool) -> Counter[str]:
    """Sizes of what a step copies, by exception; `tensor` is what has none."""

    def step() -> None:
        logits = model(clip)
        if backward:
            F.cross_entropy(logits, torch.zeros(len(clip), dtype=torch.long)).backward()

    with torch.set_grad_enabled(backward):
        step()
        model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
            step()
    weights = {tuple(p.shape) for p in model.parameters()}
    # A per-head projection is a 1x1 convolution with the heads' matrices below each other.
    weights |= {(s[0] * s[1], s[2], 1, 1) for s in weights if len(s) == 3}
    found: Counter[str] = Counter()
    for event in trace.events():
        if event.name not in MOVING or event.cpu_children:
            continue
        shape = tuple(event.input_shapes[0]) if event.input_shapes else ()
        parents, parent = [], event.cpu_parent
        while parent is not None:
            parents.append(parent.name)
            parent = parent.cpu_parent
        if shape == tuple(clip.shape) and "aten::contiguous" in parents:
            found["entry"] += 1
        elif "aten::addmm" in parents:
            found["bias of a linear layer"] += 1
        elif shape in weights or len(shape) <= 1:
            found["weight or vector"] += 1
        elif len(shape) == 2 and shape[0] <= 256:
            found["partial statistics"] += 1
        elif "aten::_slow_conv2d_forward" in parents:
            # torch computes a single tiny image by im2col, which starts from the bias.
            found["bias of a tiny convolution"] += 1
        else:
            found["tensor"] += 1
    return found


CLIPS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 3, 16, 64, 48), {}),
    ((2, 3, 16, 40, 40), {"preset": "published"}),
    ((2, 3, 16, 16, 16), {"dense_qkv": True}),  # 1x1 maps in block 4
    ((2, 3, 8, 2, 2), {"frames": 8}),  # 1x1 maps everywhere
    ((2, 3, 1, 32, 32), {"frames": 1}),
]


@pytest.mark.parametrize(("shape", "options"), CLIPS)
def test_training_copies_no_tensor(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    found = moved(ca3d_tiny(5, **options), to_channels_last(torch.randn(shape)), backward=True)
    assert found["tensor"] == found["entry"] == found["bias of a tiny convolution"] == 0


@pytest.mark.parametrize(("shape", "options"), CLIPS)
@pytest.mark.parametrize(("batch", "backward"), [(1, False), (2, True)])
def test_evaluation_copies_no_tensor(
    shape: tuple[int, ...], options: dict[str, Any], batch: int, backward: bool
) -> None:
    clip = torch.randn(batch, *shape[1:])
    found = moved(ca3d_tiny(5, **options).eval(), clip, backward)
    assert found["tensor"] == found["partial statistics"] == 0
    assert found["entry"] == (not clip.is_contiguous(memory_format=torch.channels_last_3d))


def test_the_counter_finds_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ca3d_tiny(5).eval()
    forward = model.layers["temporal3"].forward
    monkeypatch.setattr(model.layers["temporal3"], "forward", lambda x: forward(x.contiguous()))
    clip = to_channels_last(torch.randn(2, 3, 16, 64, 64))
    assert moved(model, clip, backward=False)["tensor"] >= 1


@pytest.mark.parametrize("training", [True, False])
def test_every_part_keeps_the_layout(training: bool) -> None:
    model = ca3d_tiny(5).train(training)
    wrong = []

    def check(module: torch.nn.Module, _: Any, y: torch.Tensor) -> None:
        y = y if y.dim() == 5 else y.unsqueeze(2)
        if not y.is_contiguous(memory_format=torch.channels_last_3d):
            wrong.append(module)

    for part in (*model.layers.values(), *model.layers["spatial2"].column):
        part.register_forward_hook(check)
    model(torch.randn(2, 3, 16, 64, 64))
    assert wrong == []


def test_views_are_free_and_invertible() -> None:
    for shape in (
        (2, 3, 4, 5, 6),
        (1, 3, 4, 5, 6),
        (2, 3, 1, 5, 6),
        (2, 3, 4, 1, 1),
        (1, 3, 1, 1, 1),
    ):
        clip = to_channels_last(torch.randn(shape))
        frames, lines = as_frames(clip), as_lines(clip)
        for view in (frames, lines, as_clip(frames, shape[0])):
            assert view.data_ptr() == clip.data_ptr()
        assert frames.is_contiguous(memory_format=torch.channels_last)
        assert lines.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(as_clip(frames, shape[0]), clip)
        assert torch.equal(frames[-1], clip[-1, :, -1])
        assert to_channels_last(clip).data_ptr() == clip.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_step_keeps(dtype: torch.dtype) -> None:
    """Each convolution's output and each residual sum, once, and next to nothing else."""
    model = ca3d_tiny(5).to(dtype)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(torch.randn(2, 3, 16, 64, 64, dtype=dtype)).sum()
    sizes = [size for pointer, size in kept.items() if pointer not in parameters]
    total, count = sum(sizes), sum(size >= 2048 for size in sizes)

    def tensor(channels: int, frames: int, side: int) -> int:
        return 2 * channels * frames * side * side * dtype.itemsize

    # A half with two residual blocks keeps five outputs of convolutions and the sum between them;
    # the sum at its end is kept as the next half's input, but a pool or the head keeps none.
    expected, tensors = tensor(3, 16, 64), 1
    for count_of_half, *size in ((7, 8, 16, 32), (6, 16, 16, 16), (6, 32, 8, 8), (7, 64, 4, 4)):
        expected += count_of_half * tensor(*size)
        tensors += count_of_half
    # The pools' choices, of one byte, and their results.
    for size in ((16, 8, 16), (32, 4, 8)):
        expected += tensor(*size) * (1 + dtype.itemsize) // dtype.itemsize
        tensors += 2
    # A temporal half: its input normalised, q, k and v in one, attention's sum, then the column.
    for size in ((32, 8, 8), (64, 4, 4)):
        expected += (1 + 3 + 1 + 5) * tensor(*size)
        tensors += 1 + 1 + 1 + 5
    expected, tensors = expected + tensor(32, 8, 8), tensors + 1  # the positional table's sum
    assert 0.98 * expected < total < 1.02 * expected
    assert count == tensors
