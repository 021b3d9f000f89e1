"""`ca3d bench edge`: latency and memory near the person, whole clips beside exact streaming."""

# `option` returns dataclasses.field(...), which is what a default should be.

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ca3d
from ca3d import models, streaming, weights
from ca3d.errors import UserError
from ca3d.export.options import ExportConfig
from ca3d.export.run import interleaved
from ca3d.files import check_free, write_atomically
from ca3d.models.options import CA3DOptions
from ca3d.options import option

__all__ = ["BenchConfig", "Candidate", "as_text", "bench", "make_candidates", "missing"]

CLASSES = 101
RUNTIMES = ("torch", "onnx", "executorch")
_PACKAGES = {"torch": "torch", "onnx": "onnxruntime", "executorch": "executorch"}


@dataclass
class BenchConfig:
    """Every option of `ca3d bench`; `ca3d bench --help` prints what each of them means.

    Example:
        >>> BenchConfig("edge", threads="1,0").validate()
        Traceback (most recent call last):
        ca3d.errors.UserError: --threads must be numbers of at least 1, not '1,0'
    """

    suite: str = option("", "edge", "Benchmark", positional=True)
    model: str = option("ca3d", "CA3D model, as in `ca3d info --models`", "Benchmark")
    preset: str | None = option(None, "Its preset: published, or none", "Benchmark")
    peers: str = option("r3d_18,x3d_xl", "Models beside it, by name; missing ones are named")
    runtimes: str | None = option(
        None, "Of torch, onnx, executorch (default: those that are installed)", "Benchmark"
    )
    precisions: str = option("float32,int8", "Of float32, float16, int8 (ONNX)", "Benchmark")
    strides: str = option("1,2,4", "Frames from one window of a stream to the next", "Benchmark")
    threads: str = option("1,2", "Numbers of threads", "Benchmark")
    size: int = option(112, "Height and width of the frames", "Benchmark")
    rounds: int = option(20, "Timed rounds; in each every candidate runs once", "Benchmark")
    memory: bool = option(False, "Measure memory too, each candidate in a process of its own")
    json: str | None = option(None, "File to write the rows to")
    force: bool = option(False, "Replace that file if it is there")

    def validate(self) -> None:
        """Raises `UserError` for the first option whose value is not allowed."""
        if self.suite != "edge":
            raise UserError(f"SUITE must be edge, not {self.suite!r}")
        known = models.names()
        if self.model not in known:
            raise UserError(f"--model {self.model!r} is not known; choose from {', '.join(known)}")
        for flag, value, allowed in (
            ("--runtimes", self.runtimes or "torch", RUNTIMES),
            ("--precisions", self.precisions, ("float32", "float16", "int8")),
        ):
            for word in _words(value):
                if word not in allowed:
                    raise UserError(f"{flag} must be of {', '.join(allowed)}, not {word!r}")
        for name in ("strides", "threads"):
            value = getattr(self, name)
            if not all(word.isdigit() and int(word) for word in _words(value)):
                raise UserError(f"--{name} must be numbers of at least 1, not {value!r}")
        clip = CA3DOptions().frames
        if any(int(word) > clip for word in _words(self.strides)):
            raise UserError(f"--strides must be at most a clip's {clip} frames: {self.strides!r}")
        for name in ("size", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.json is not None:
            check_free(self.json, force=self.force, flag="--json")


@dataclass(frozen=True)
class Candidate:
    """One way of running a model.

    Attributes:
        model: its name.
        runtime: ``"torch"`` (fused by `ca3d.fuse`), ``"onnx"`` or ``"executorch"``.
        precision: of weights and activations.
        stride: frames from one window of a stream to the next; None computes whole clips.
        files: weights file, or folder of an export.
        bytes: of the files that it needs.
        frames, size: of a clip.

    Example:
        >>> Candidate("ca3d", "onnx", "int8", 2, "exported", 8_000_000, 16, 112).name
        'ca3d onnx int8, stream by 2'
    """

    model: str
    runtime: str
    precision: str
    stride: int | None
    files: str
    bytes: int
    frames: int
    size: int

    @property
    def name(self) -> str:
        """For people."""
        mode = "whole clip" if self.stride is None else f"stream by {self.stride}"
        return f"{self.model} {self.runtime} {self.precision}, {mode}"

    def load(self, threads: int) -> tuple[Callable[[], object], Any]:
        """Makes it ready.

        Args:
            threads: of one run; torch's are set by the caller.

        Returns:
            What computes the logits of one window, and the stream or None.
        """
        generator = torch.Generator().manual_seed(0)
        video = torch.randn(3, self.frames, self.size, self.size, generator=generator)
        if self.stride is None:
            classify = self._classifier(threads)
            clip = video[None]
            return lambda: classify(clip), None
        stream = self._stream(threads)
        stream.push(video)
        new = video[:, : self.stride].contiguous()

        def step() -> Tensor:
            logits: Tensor | None = stream.push(new)
            assert logits is not None
            return logits

        return step, stream

    def _classifier(self, threads: int) -> Callable[[Tensor], Tensor]:
        if self.runtime == "torch":
            model = ca3d.fuse(weights.load(self.files)[0])

            def run(clips: Tensor) -> Tensor:
                with torch.no_grad():
                    logits: Tensor = model(clips)
                return logits

            return run
        if self.runtime == "onnx":
            from ca3d.export.onnx_runtime import OnnxClassifier

            return OnnxClassifier(self.files, threads)
        from ca3d.export import to_executorch

        return to_executorch.classifier(Path(self.files) / "clip.pte", threads)

    def _stream(self, threads: int) -> Any:
        assert self.stride is not None
        if self.runtime == "torch":
            return streaming.Stream(ca3d.fuse(weights.load(self.files)[0]), self.stride)
        from ca3d.export.onnx_runtime import OnnxStream

        return OnnxStream(self.files, self.stride, threads)


def bench(
    config: BenchConfig, progress: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Measures all candidates.

    They take turns in every round, so that a busy machine slows all alike: trust the ratios.
    int8 is calibrated on noise here, which says nothing about accuracy and nothing wrong about
    speed.

    Args:
        config: The options.
        progress: Called with a line about what is being done.

    Returns:
        A dictionary for each candidate and number of threads: the candidate's attributes, threads,
        milliseconds (p50, p90, p99), windows_per_second, frames_per_second (new frames that a
        video may have), state_bytes, and with --memory peak_bytes.

    Raises:
        ca3d.errors.UserError: An option is not allowed, or a package is missing.
    """
    config.validate()
    for line in missing(config):
        progress(line)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ca3d-bench-") as folder:
        candidates = make_candidates(config, Path(folder), progress)
        before = torch.get_num_threads()
        try:
            for threads in map(int, _words(config.threads)):
                progress(f"timing {len(candidates)} candidates with {threads} threads")
                rows += _timed(candidates, threads, config.rounds)
        finally:
            torch.set_num_threads(before)
        if config.memory:
            for candidate in candidates:
                progress(f"memory of {candidate.name}")
                peak = _memory_apart(candidate)
                for row in rows:
                    if row["name"] == candidate.name:
                        row["peak_bytes"] = peak
    for row in rows:
        del row["files"]
    if config.json is not None:
        text = json.dumps(rows, indent=2) + "\n"
        write_atomically(config.json, lambda path: path.write_text(text, encoding="utf-8"))
    return rows


def missing(config: BenchConfig) -> list[str]:
    """What can't be measured here, and why, a line each.

    Args:
        config: The options.

    Example:
        >>> missing(BenchConfig("edge", peers="", runtimes="torch"))
        []
    """
    lines = []
    for runtime in RUNTIMES:
        if importlib.util.find_spec(_PACKAGES[runtime]) is None:
            line = f'{runtime}: not installed (pip install "ca3d-kernels[{runtime}]")'
            if config.runtimes is None:
                lines.append(line)
            elif runtime in _words(config.runtimes):
                raise UserError(line)
    for peer in _words(config.peers):
        if peer not in models.names():
            lines.append(f"{peer}: no model of this name here")
    return lines


def make_candidates(
    config: BenchConfig, folder: Path, progress: Callable[[str], None] = lambda line: None
) -> list[Candidate]:
    """Builds the models, exports them, and lists every way of running them.

    Args:
        config: The options.
        folder: Where weights and exports go.
        progress: Called with a line about what is being done.
    """
    chosen = _words(config.runtimes) if config.runtimes else list(RUNTIMES)
    runtimes = [r for r in chosen if importlib.util.find_spec(_PACKAGES[r]) is not None]
    strides = [int(word) for word in _words(config.strides)]
    peers = [name for name in _words(config.peers) if name in models.names()]
    found: list[Candidate] = []
    for name in (config.model, *peers):
        ours = name == config.model
        model, info = _build(config, name, folder / f"{name}.safetensors")
        conv3d = any(isinstance(module, nn.Conv3d) for module in model.modules())
        for runtime in runtimes:
            if runtime == "executorch" and (conv3d or not ours):
                progress(f"{name}: left out of executorch, which has no 3-D convolutions on a CPU")
                continue
            for precision in _words(config.precisions):
                if (runtime, precision) in (("torch", "int8"), ("executorch", "int8")):
                    continue
                if (runtime, precision) == ("torch", "float16"):
                    continue  # stored in half, computed in float32: not a matter of speed
                modes: list[int | None] = [None]
                if ours and runtime != "executorch":
                    modes += strides
                for stride in modes:
                    files = folder / f"{name}.safetensors"
                    if runtime != "torch":
                        pairs = stride is not None and stride % 2 == 0
                        files = folder / f"{name}-{runtime}-{precision}{'-pairs' * pairs}"
                        _export(model, info, runtime, precision, ours, stride or 1, files, progress)
                    found.append(
                        Candidate(
                            name,
                            runtime,
                            precision,
                            stride,
                            str(files),
                            _size(files, stride),
                            info.frames,
                            info.size,
                        )
                    )
    return found


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table.

    Args:
        rows: What `bench` returned.

    Example:
        >>> as_text([])
        'nothing was measured'
    """
    if not rows:
        return "nothing was measured"
    lines = [
        f"{'threads':>7}  {'':<40} {'p50 ms':>8} {'p90 ms':>8} {'p99 ms':>8} {'frames/s':>9} "
        f"{'file MB':>8} {'state MB':>9} {'peak MB':>8}"
    ]
    for row in rows:
        p50, p90, p99 = (row["milliseconds"][key] for key in ("p50", "p90", "p99"))
        state, peak = (
            "-" if row.get(key) is None else f"{row[key] / 1e6:.1f}"
            for key in ("state_bytes", "peak_bytes")
        )
        lines.append(
            f"{row['threads']:>7}  {row['name']:<40} {p50:>8.1f} {p90:>8.1f} {p99:>8.1f} "
            f"{row['frames_per_second']:>9.1f} {row['bytes'] / 1e6:>8.1f} {state:>9} {peak:>8}"
        )
    first = rows[0]
    lines.append(
        f"one window of {first['frames']}x{first['size']}x{first['size']} at a time, candidates in "
        "turn; frames/s: new frames that a window in every clip (whole clip) or in every stride "
        "(stream) leaves time for"
    )
    return "\n".join(lines)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _build(config: BenchConfig, name: str, path: Path) -> tuple[nn.Module, weights.ModelInfo]:
    torch.manual_seed(0)
    options = {"preset": config.preset} if name == config.model and config.preset else {}
    model = models.create(name, num_classes=CLASSES, **options).eval()
    info = weights.ModelInfo(
        name,
        dict(model.options),  # type: ignore[arg-type]
        frames=int(getattr(model, "frames", 16)),
        size=config.size,
        resize=config.size,
    )
    weights.save(path, model, info)
    return model, info


def _export(
    model: nn.Module,
    info: weights.ModelInfo,
    runtime: str,
    precision: str,
    stream: bool,
    stride: int,
    folder: Path,
    progress: Callable[[str], None],
) -> None:
    if folder.exists():
        return
    folder.mkdir()
    from ca3d.export import to_executorch, to_onnx

    options = ExportConfig(
        runtime,
        precision=precision,  # type: ignore[arg-type]
        stream=stream and runtime == "onnx",
        stride=stride,
        threads=torch.get_num_threads(),
    )
    shape = (4, 3, info.frames, info.size, info.size)
    clips = list(torch.randn(shape, generator=torch.Generator().manual_seed(1)).unbind())
    progress(f"exporting {info.model} to {runtime} in {precision}")
    write = to_onnx.write if runtime == "onnx" else to_executorch.write
    write(options, model, info, clips, folder, lambda line: None)


def _size(files: Path, stride: int | None) -> int:
    if files.is_file():
        return files.stat().st_size
    names = ["clip.onnx", "clip.pte"] if stride is None else ["encoder.onnx", "head.onnx"]
    return sum((files / name).stat().st_size for name in names if (files / name).is_file())


def _timed(candidates: Sequence[Candidate], threads: int, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    loaded = {candidate.name: candidate.load(threads) for candidate in candidates}
    seconds = interleaved({name: run for name, (run, _) in loaded.items()}, rounds)
    rows = []
    for candidate in candidates:
        taken = seconds[candidate.name]
        times = 1e3 * torch.tensor(taken)
        median = statistics.median(taken)
        stream = loaded[candidate.name][1]
        rows.append(
            {
                "name": candidate.name,
                **dataclasses.asdict(candidate),
                "threads": threads,
                "milliseconds": {f"p{p}": float(times.quantile(p / 100)) for p in (50, 90, 99)},
                "windows_per_second": 1 / median,
                "frames_per_second": (candidate.stride or candidate.frames) / median,
                "state_bytes": None if stream is None else stream.memory_bytes,
            }
        )
    return rows


def _memory_apart(candidate: Candidate) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_memory, (candidate,))


def measure_memory(candidate: Candidate) -> int:
    """Growth of this process's largest resident set by loading a candidate and running it.

    Args:
        candidate: What to run; the process must have done nothing else.

    Returns:
        Bytes.
    """
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        importlib.import_module(_PACKAGES[candidate.runtime])
    before = _resident("VmRSS")
    run, _ = candidate.load(1)
    for _ in range(3):
        run()
    return max(_resident("VmHWM") - before, 0)


def _resident(field: str) -> int:
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found is None:
        raise UserError("--memory is measured by /proc/self/status, which this system lacks")
    return int(found[1]) * 1024
