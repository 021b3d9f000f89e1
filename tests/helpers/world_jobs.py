"""What `workers.py` runs in the processes of a world."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import workers

from ca3d import models, precision
from ca3d.models.sync_norm import synchronise
from ca3d.precision import Float32
from ca3d.training.distributed import connect

TINY = {"widths": [4, 4, 8, 8], "dropout": 0.0, "frames": 8}


def model_and_clips(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The same in every process, whatever was drawn before."""
    torch.manual_seed(3)
    model = models.create("ca3d_tiny", num_classes=3, **TINY).to(dtype)
    clips = torch.randn(7, 3, 8, 16, 16, dtype=dtype)
    return model.train(), clips, torch.tensor([0, 1, 2, 0, 1, 2, 0])


def step(out: str, dtype: str, sync: bool = True, ordered: bool = False) -> list[float]:
    """One forward and backward pass over a global batch of seven, saved by the first process."""
    with connect(torch.device("cpu"), ordered) as world:
        model, clips, labels = model_and_clips(getattr(torch, dtype))
        if sync and world.size > 1:
            synchronise(model)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        network = world.wrap(model, lambda model: model(clips[:2]))
        assert all(torch.equal(before[n], b) for n, b in model.named_buffers())
        own = world.share(range(7))
        logits = network(clips[own])
        loss = F.cross_entropy(logits, labels[own]) * (len(own) / 7)
        loss.backward()
        total = float(world.rows([loss.item()]).sum())
        state = {
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "buffers": dict(model.named_buffers()),
        }
        everyone = world.gather(state)
        for other in everyone[1:]:
            for part, tensors in everyone[0].items():
                same = all(torch.equal(x, other[part][name]) for name, x in tensors.items())
                assert same or (part == "buffers" and not sync), f"{part} differ"
        if world.is_first:
            torch.save(state, Path(out))
        return [total]


def sum_of_halves(out: str, ordered: bool) -> list[str]:
    """Sums float16 gradients that a wider sum would round otherwise; tells the buckets' dtypes."""
    from ca3d.training import distributed

    seen: list[str] = []
    name = "_sum_in_order" if ordered else "_sum"
    hook: Any = getattr(distributed, name)

    def watched(
        world: distributed.World, bucket: torch.distributed.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        seen.append(str(bucket.buffer().dtype))
        return hook(world, bucket)

    setattr(distributed, name, watched)
    with connect(torch.device("cpu"), ordered) as world:
        layer = torch.nn.Linear(64, 64, bias=False).half()
        network = world.wrap(layer, lambda layer: layer.weight.sum())
        torch.manual_seed(world.rank)
        own = torch.randn(64, 64).half() * 300
        # float16's largest number is 65504: means of pre-multiplied gradients would overflow here.
        own[0] = 20000.0
        (network(torch.eye(64).half()).T * own).sum().backward()
        assert layer.weight.grad is not None
        parts = world.gather(own)
        if world.is_first:
            torch.save({"sum": layer.weight.grad, "parts": parts}, Path(out))
    return seen


class Float64(Float32):
    """A regime in which two ways to sum differ so little that training doesn't amplify it."""

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.double()

    def forward(self, model: torch.nn.Module, clips: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(clips.double())
        return logits

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        return F.cross_entropy(logits, labels, **options)


def train_in_float64(**options: Any) -> None:
    precision.create = lambda name: Float64()
    workers.train(**options)


def shares(length: int) -> list[int]:
    """This process's videos of a split."""
    with connect(torch.device("cpu")) as world:
        return world.share(range(length))
