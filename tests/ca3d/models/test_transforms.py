"""Whole models under torch.compile, torch.export, checkpointing, autocast and copying."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ca3d.models import ca3d_tiny

CLIP = (2, 3, 8, 24, 24)
# Two blocks, of which one has a temporal half: every kind of part, and few of them to compile.
SMALL = {
    "frames": 8,
    "widths": (8, 16),
    "spatial_depths": (1, 1),
    "temporal_depths": (0, 1),
    "spatial_heads": (1, 2),
    "temporal_heads": (0, 2),
    "dropout": 0.0,
}


@pytest.mark.parametrize("training", [False, True])
def test_compile(training: bool) -> None:
    model = ca3d_tiny(5, **SMALL).double().train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    clip = torch.randn(CLIP, dtype=torch.float64)
    torch.testing.assert_close(compiled(clip), model(clip))
    compiled(clip).sum().backward()
    model(clip).sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_export_with_a_free_batch() -> None:
    model = ca3d_tiny(5, **SMALL).eval()
    clip = torch.randn(CLIP)
    dims = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (clip,), dynamic_shapes=(dims,))
    other = torch.randn(5, *CLIP[1:])
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other), model(other), rtol=1e-4, atol=1e-5)


def test_checkpointing_recomputes_the_same() -> None:
    model = ca3d_tiny(5, frames=8, dropout=0.0).double()
    clip = torch.randn(CLIP, dtype=torch.float64)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        features = model.encode_pairs(model.encode_frames(clip))
        encode = model.encode_clip
        y = checkpoint(encode, features, use_reentrant=False) if recompute else encode(features)
        model.classify(y).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_trains_in_bfloat16() -> None:
    model = ca3d_tiny(5, frames=8)
    clip, labels = torch.randn(CLIP), torch.tensor([0, 1])
    seen = set()
    for layer in model.layers.values():
        layer.register_forward_hook(lambda _, __, y: seen.add(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(clip).float(), labels)
    loss.backward()
    assert seen == {torch.bfloat16}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_training_reduces_the_loss() -> None:
    torch.manual_seed(1)
    model = ca3d_tiny(4, **{**SMALL, "frames": 4})
    clips, labels = torch.randn(8, 3, 4, 12, 12), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(clips), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains(dtype: torch.dtype) -> None:
    """A step keeps nothing wider than the model's dtype but O(channels) numbers."""
    exact = ca3d_tiny(5, frames=8, dropout=0.0)
    model = copy.deepcopy(exact).to(dtype)
    clip, labels = torch.randn(8, *CLIP[1:]), torch.arange(8) % 5
    wide: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.dtype.itemsize > 2 and x.numel() > 64:
            wide.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits = model(clip.to(dtype))
    assert wide == []
    losses = [F.cross_entropy(x.float(), labels) for x in (logits, exact(clip))]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.1)
    for loss in losses:
        loss.backward()
    directions = []
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.dtype == dtype
        assert p.grad.isfinite().all()
        directions.append(F.cosine_similarity(p.grad.float().flatten(), q.grad.flatten(), dim=0))
    # Normalisation over eight clips in the head enlarges roundings in the gradients.
    assert torch.stack(directions).median() > 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_state_dict_survives_saving(dtype: torch.dtype) -> None:
    model = ca3d_tiny(5, frames=8).to(dtype)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = ca3d_tiny(5, frames=8).to(dtype)
    other.load_state_dict(torch.load(file, weights_only=True))
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
        assert a.stride() == b.stride(), name


def test_copies_are_independent() -> None:
    model = ca3d_tiny(5, frames=8)
    twin = copy.deepcopy(model)
    clip = torch.randn(CLIP)
    with torch.no_grad():
        twin(clip)
    before, after = (m.layers["spatial1"].norm.running_mean for m in (model, twin))
    assert not torch.equal(before, after)


def test_half_precision_evaluates() -> None:
    model = ca3d_tiny(5, frames=8).eval()
    clip = torch.randn(CLIP)
    with torch.no_grad():
        expected = model(clip)
        for dtype, bound in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
            logits = copy.deepcopy(model).to(dtype)(clip.to(dtype))
            assert logits.dtype == dtype
            assert (logits.float() - expected).abs().max() < bound * expected.abs().max()
