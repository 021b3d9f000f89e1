"""What a model costs: memory of a training step by kind, and speed in training and inference.

Models are measured as they are shipped, by their libraries or by this package; those of
convolutions also on the engine that CA3D has (`ca3d.models.engine`), so that two tables keep apart
what an architecture costs and what its implementation does.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ca3d import models, precision
from ca3d.errors import UserError
from ca3d.files import check_free
from ca3d.models import engine
from ca3d.options import option
from ca3d.training.device import choose_device
from ca3d.training.logs import write_json

CLASSES = 101
#: The models of the paper's comparison, with CA3D as its code has it.
ALL = (
    "r3d_18", "r2plus1d_18", "r2plus1d_18_15m", "i3d", "x3d_xl", "stam_b", "timesformer_b",
    "vivit_2", "swin3d_t", "tubevit_b", "ca3d", "ca3d:pool=published", "ca3d_l",
    "ca3d_l:pool=published",
)  # fmt: skip
SHIPPED, SAME, BOTH = "as shipped", "same engine", "both"


@dataclass
class FootprintConfig:
    """Every option of `ca3d footprint`.

    Example:
        >>> FootprintConfig().batch
        4
    """

    models: str = option(
        "ca3d",
        "Models, separated by commas, each NAME or NAME:OPTION=VALUE:...; 'all' are the paper's",
    )
    regimes: str = option("float32,float16", "Precision regimes, separated by commas")
    batch: int = option(4, "Clips in a batch")
    frames: int = option(16, "Frames in a clip")
    size: int = option(112, "Height and width of a clip in pixels")
    engines: Literal["both", "shipped", "same"] = option(
        "both",
        "'shipped': as the libraries have them; 'same': convolutional models on CA3D's layout,"
        " convolutions and normalisation",
    )
    rounds: int = option(5, "Timed rounds; each measures every row once")
    threads: int | None = option(None, "Threads (default: torch's)")
    device: str = option("auto", "cpu, cuda, cuda:1 ... (auto: cuda when there is one)")
    json: str | None = option(None, "File to write the rows to")
    force: bool = option(False, "Replace that file if it is there")

    def validate(self) -> None:
        """Raises a `ca3d.errors.UserError` for an option that is not allowed."""
        for name in ("batch", "frames", "size", "rounds", "threads"):
            value = getattr(self, name)
            least = 2 if name == "batch" else 1
            if value is not None and value < least:
                raise UserError(f"--{name} must be at least {least}, not {value}")
        if self.json is not None and not Path(self.json).absolute().parent.is_dir():
            raise UserError(f"--json {self.json}: no such folder")
        if self.json is not None:
            check_free(self.json, force=self.force, flag="--json")
        known = models.names()
        for spec in _specs(self.models):
            name, _ = _name_and_options(spec)
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
        A dictionary for each row: model, regime, engine ("as shipped", "same engine", or "both" of
        CA3D, which has no other), batch, clip, parameters, macs, two_macs,
        train_frames_per_second, infer_frames_per_second, peak_train_bytes and memory (a `Memory`).

    Raises:
        ca3d.errors.UserError: An option is not allowed, or a row can't be measured.
    """
    config.validate()
    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rows, jobs = [], []
    for spec in _specs(config.models):
        plain = _on_meta(config, spec)
        parameters = sum(p.numel() for p in plain.parameters())
        clip = [3, config.frames, config.size, config.size]
        macs = models.count_macs(plain, (1, *clip))["total"]
        for regime, kind in _variants(config, plain):
            progress(f"memory of {spec} in {regime}, {kind}")
            memory = _memory_apart(config, spec, regime, kind, device)
            job = Job(config, spec, regime, kind, device)
            rows.append(
                {
                    "model": spec,
                    "regime": regime,
                    "engine": kind,
                    "batch": config.batch,
                    "clip": clip,
                    "parameters": parameters,
                    "macs": macs,
                    "two_macs": 2 * macs,
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
        write_json(Path(config.json), rows)
    return rows


class Job:
    """One model in one regime on one engine, ready to train and to infer.

    Args:
        config: The options.
        spec: Model, with options or without.
        regime: Of the precision.
        kind: Of the engine, as in a row.
        device: Where to compute.
    """

    def __init__(
        self, config: FootprintConfig, spec: str, regime: str, kind: str, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        self.regime = precision.create(regime)
        self.device = device
        self.same = kind == SAME
        model = _create(config, spec)
        if self.same:
            model = engine.same_engine(model)
        self.model = self.regime.prepare(model.to(device))
        self._folded: nn.Module | None = None
        self.parameters = list(self.model.parameters())
        self.optimizer = self.regime.optimizer("sgd", self.parameters, lr=1e-4, weight_decay=5e-3)
        shape = (config.batch, 3, config.frames, config.size, config.size)
        self.clips = torch.randn(shape, device=device)
        if self.same:
            self.clips = self.clips.contiguous(memory_format=torch.channels_last_3d)
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
        """Classifies one clip; on the same engine, with normalisations folded where they can be."""
        if self.same:
            if self._folded is None:
                self._folded = engine.folded(self.model)
            self.regime.forward(self._folded, self.clips[:1])
        else:
            self.regime.forward(self.model.eval(), self.clips[:1])

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UserError("--models and --regimes must name at least one each")
    return words


def _specs(text: str) -> list[str]:
    return [spec for word in _words(text) for spec in (ALL if word == "all" else (word,))]


def _name_and_options(spec: str) -> tuple[str, dict[str, Any]]:
    """Of "ca3d:pool=published:frames=8"; values are JSON where they can be, and text elsewhere."""
    name, *settings = spec.split(":")
    options = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise UserError(f"--models {spec!r}: {setting!r} is not OPTION=VALUE")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return name, options


def _create(config: FootprintConfig, spec: str) -> nn.Module:
    name, options = _name_and_options(spec)
    shape = {"frames": config.frames, "size": config.size}
    try:
        return models.create_for_clips(name, num_classes=CLASSES, **{**shape, **options})
    except (TypeError, ValueError) as error:
        raise UserError(f"--models {spec}: {error}") from error


def _on_meta(config: FootprintConfig, spec: str) -> nn.Module:
    with torch.device("meta"):
        return _create(config, spec)


def _variants(config: FootprintConfig, model: nn.Module) -> list[tuple[str, str]]:
    """Regimes and engines to measure a model in."""
    if isinstance(model, models.CA3D):
        kinds = [{"both": BOTH, "shipped": SHIPPED, "same": SAME}[config.engines]]
    else:
        kinds = [SHIPPED] if config.engines != "same" else []
        if config.engines != "shipped" and engine.is_convolutional(model):
            kinds.append(SAME)
    return [(regime, kind) for regime in _words(config.regimes) for kind in kinds]


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


def _memory_apart(
    config: FootprintConfig, spec: str, regime: str, kind: str, device: torch.device
) -> Memory:
    """Measures in a fresh process, whose largest resident set is of this row alone."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure_memory, (config, spec, regime, kind, str(device)))


def measure_memory(
    config: FootprintConfig, spec: str, regime: str, kind: str, device: str
) -> Memory:
    """Measures the memory of training steps in this process, which must have done nothing else.

    Args:
        config: The options.
        spec: Model, with options or without.
        regime: Of the precision.
        kind: Of the engine, as in a row.
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
    _on_meta(config, spec)
    small = FootprintConfig(batch=2, frames=config.frames, size=32)
    Job(small, "ca3d_tiny", regime, SHIPPED, place).train()
    # What it freed would serve the model, and be missing from the model's growth.
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    before = _used(place, largest=False)
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    job = Job(config, spec, regime, kind, place)
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
