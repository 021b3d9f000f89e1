"""What a model costs: memory of a training step by kind, and speed in training and inference."""

from __future__ import annotations

import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ca3d import models, precision
from ca3d.errors import UserError
from ca3d.options import option
from ca3d.training.device import choose_device

CLASSES = 101


@dataclass
class FootprintConfig:
    """Every option of `ca3d footprint`.

    Example:
        >>> FootprintConfig().batch
        4
    """

    models: str = option("ca3d", "Models, separated by commas")
    regimes: str = option("float32,float16", "Precision regimes, separated by commas")
    batch: int = option(4, "Clips in a batch")
    frames: int = option(16, "Frames in a clip")
    size: int = option(112, "Height and width of a clip in pixels")
    rounds: int = option(5, "Timed rounds; each measures every row once")
    threads: int | None = option(None, "Threads (default: torch's)")
    device: str = option("auto", "cpu, cuda, cuda:1 ... (auto: cuda when there is one)")
    json: str | None = option(None, "File to write the rows to")

    def validate(self) -> None:
        """Raises a `ca3d.errors.UserError` for an option that is not allowed."""
        for name in ("batch", "frames", "size", "rounds", "threads"):
            value = getattr(self, name)
            least = 2 if name == "batch" else 1
            if value is not None and value < least:
                raise UserError(f"--{name} must be at least {least}, not {value}")
        known = models.names()
        for name in _words(self.models):
            if name not in known:
                raise UserError(f"model {name!r} is not known; choose from {', '.join(known)}")
        for name in _words(self.regimes):
            precision.create(name)


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step.

    Attributes:
        weights: of parameters and buffers.
        gradients: of the parameters.
        optimizer: of its state.
        activations: tensors that the graph keeps between forward and backward.
        peak: of all memory at any moment, less what the process took before it had the model. On a
            CPU it is the growth of the largest resident set, on CUDA torch's own count.
        transient: the rest of the peak: copies, workspaces, what the allocator holds.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    transient: int


def footprint(
    config: FootprintConfig, progress: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Measures all models in all regimes.

    Memory is measured in a process of its own for every row; speeds are medians over rounds in
    which the rows take turns.

    Args:
        config: The options.
        progress: Called with a line about what is being measured.

    Returns:
        A dictionary for each row: model, regime, batch, clip, parameters, macs,
        train_frames_per_second, infer_frames_per_second, peak_train_bytes and memory (a `Memory`).

    Raises:
        ca3d.errors.UserError: An option is not allowed, or a row can't be measured.
    """
    config.validate()
    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    pairs = [(m, r) for m in _words(config.models) for r in _words(config.regimes)]
    rows, jobs = [], []
    for name, regime in pairs:
        progress(f"memory of {name} in {regime}")
        memory = _memory_apart(config, name, regime, device)
        job = Job(config, name, regime, device)
        parameters = sum(p.numel() for p in job.model.parameters())
        clip = [3, config.frames, config.size, config.size]
        rows.append(
            {
                "model": name,
                "regime": regime,
                "batch": config.batch,
                "clip": clip,
                "parameters": parameters,
                "macs": _macs(config, name, (1, *clip)),
                "device": str(device),
                "threads": torch.get_num_threads(),
                "peak_train_bytes": memory.peak,
                "memory": asdict(memory),
            }
        )
        jobs.append(job)
    progress("speed")
    for key, run, frames in (
        ("train_frames_per_second", Job.train, config.batch * config.frames),
        ("infer_frames_per_second", Job.infer, config.frames),
    ):
        for row, seconds in zip(rows, _interleaved(jobs, run, config.rounds), strict=True):
            row[key] = frames / seconds
    if config.json is not None:
        Path(config.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


class Job:
    """One model in one regime, ready to train and to infer.

    Args:
        config: The options.
        name: Of the model.
        regime: Of the precision.
        device: Where to compute.
    """

    def __init__(
        self, config: FootprintConfig, name: str, regime: str, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        self.regime = precision.create(regime)
        self.device = device
        model = models.create(name, num_classes=CLASSES, frames=config.frames)
        self.model = self.regime.prepare(model.to(device))
        self.parameters = list(self.model.parameters())
        self.optimizer = self.regime.optimizer("sgd", self.parameters, lr=1e-4, weight_decay=5e-3)
        shape = (config.batch, 3, config.frames, config.size, config.size)
        self.clips = torch.randn(shape, device=device)
        self.labels = torch.arange(config.batch, device=device) % CLASSES

    def train(self) -> None:
        """Takes one training step."""
        self.model.train()
        self.forward_and_backward()
        self.regime.step(self.optimizer, self.parameters)

    def forward_and_backward(self) -> None:
        """Leaves the gradients of a batch."""
        logits = self.regime.forward(self.model, self.clips)
        self.regime.backward(self.regime.loss(logits, self.labels))

    @torch.no_grad()
    def infer(self) -> None:
        """Classifies one clip."""
        self.model.eval()
        self.regime.forward(self.model, self.clips[:1])

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table.

    Args:
        rows: What `footprint` returned.

    Example:
        >>> as_text([])
        'nothing was measured'
    """
    if not rows:
        return "nothing was measured"
    lines = [
        f"{'model':<12} {'regime':<18} {'MACs/clip':>10} {'train fr/s':>11} {'infer fr/s':>11} "
        f"{'peak MB':>8}   weights + gradients + optimizer + activations + transient (MB)"
    ]
    for row in rows:
        parts = ["weights", "gradients", "optimizer", "activations", "transient"]
        memory = " + ".join(f"{row['memory'][part] / 1e6:.0f}" for part in parts)
        lines.append(
            f"{row['model']:<12} {row['regime']:<18} {row['macs'] / 1e9:>9.2f}G "
            f"{row['train_frames_per_second']:>11.1f} {row['infer_frames_per_second']:>11.1f} "
            f"{row['peak_train_bytes'] / 1e6:>8.0f}   {memory}"
        )
    first = rows[0]
    lines.append(
        f"batch {first['batch']}, clip {'x'.join(map(str, first['clip']))}, {first['device']}, "
        f"{first['threads']} threads; medians of interleaved rounds; inference is of one clip"
    )
    return "\n".join(lines)


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UserError("--models and --regimes must name at least one each")
    return words


def _macs(config: FootprintConfig, name: str, clip: tuple[int, ...]) -> int:
    model = models.create(name, num_classes=CLASSES, frames=config.frames)
    return models.count_macs(model, clip)["total"]


def _interleaved(jobs: Sequence[Job], run: Callable[[Job], None], rounds: int) -> list[float]:
    seconds: list[list[float]] = [[] for _ in jobs]
    for number in range(rounds + 1):  # the first is for warming up
        for job, found in zip(jobs, seconds, strict=True):
            precision.return_freed_memory(job.regime.compact)
            job.synchronize()
            begin = time.perf_counter()
            run(job)
            job.synchronize()
            if number:
                found.append(time.perf_counter() - begin)
    return [statistics.median(found) for found in seconds]


# ---- memory ----


def _memory_apart(config: FootprintConfig, name: str, regime: str, device: torch.device) -> Memory:
    """Measures in a fresh process, whose largest resident set is of this row alone."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure_memory, (config, name, regime, str(device)))


def measure_memory(config: FootprintConfig, name: str, regime: str, device: str) -> Memory:
    """Measures the memory of training steps in this process, which must have done nothing else.

    Args:
        config: The options.
        name: Of the model.
        regime: Of the precision.
        device: Where to compute.

    Returns:
        The bytes by kind.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    place = torch.device(device)
    if precision.create(regime).compact:
        precision.return_freed_memory()
    # What libraries load at their first use is no cost of the model.
    small = FootprintConfig(batch=2, frames=config.frames, size=32)
    Job(small, "ca3d_tiny", regime, place).train()
    before = _used(place, largest=False)
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    job = Job(config, name, regime, place)
    job.train()
    job.model.train()
    activations = _kept(job)
    gradients = _bytes(p.grad for p in job.parameters if p.grad is not None)
    job.regime.step(job.optimizer, job.parameters)
    job.train()
    peak = max(_used(place, largest=True) - before, 0)
    weights = _bytes([*job.model.parameters(), *job.model.buffers()])
    state = (x for s in job.optimizer.state.values() for x in s.values() if isinstance(x, Tensor))
    optimizer = _bytes(state)
    known = weights + gradients + optimizer + activations
    return Memory(weights, gradients, optimizer, activations, peak, max(peak - known, 0))


def _kept(job: Job) -> int:
    """Bytes that the graph keeps, each storage once; weights and the input don't count."""
    own = {x.untyped_storage().data_ptr() for x in [*job.model.parameters(), *job.model.buffers()]}
    own.add(job.clips.untyped_storage().data_ptr())
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(x.detach())  # so that no other tensor gets the address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits = job.regime.forward(job.model, job.clips)
        loss = job.regime.loss(logits, job.labels)
    alive.clear()
    job.regime.backward(loss)
    return sum(sizes.values())


def _bytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _used(device: torch.device, *, largest: bool) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        found = torch.cuda.max_memory_allocated if largest else torch.cuda.memory_allocated
        return int(found(device))
    # Not getrusage: its maximum starts at the size of the process that started this one.
    field = r"VmHWM:\s*(\d+) kB" if largest else r"VmRSS:\s*(\d+) kB"
    found_size = re.search(field, Path("/proc/self/status").read_text())
    if found_size is None:
        raise UserError("memory is measured by /proc/self/status, which this system lacks")
    return int(found_size[1]) * 1024
