"""`ca3d export`: writes a model for another runtime, runs it there, and compares the two."""

from __future__ import annotations

import dataclasses
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ca3d import precision, streaming, weights
from ca3d.errors import UserError
from ca3d.evaluate import weights_file
from ca3d.export import STREAM_FILES, file_name
from ca3d.export.options import ExportConfig
from ca3d.files import check_free, write_atomically
from ca3d.models.model import CA3D

__all__ = ["Comparison", "Export", "export", "interleaved"]

_SAMPLES = 4  # clips that the outputs are compared on


@dataclass(frozen=True)
class Comparison:
    """One exported graph, or a stream of two, beside the model it came from.

    Attributes:
        name: ``"clip"``, or ``"stream"``.
        files: names of the files.
        bytes: their size together.
        difference: largest difference of logits on a few clips.
        scale: largest logit there.
        same_class: share of these clips that both give the same class.
        milliseconds: median latency of the exported side: of a clip, or of one step of the stream.
        model_milliseconds: the same of the model in torch, taken in turn.

    Example:
        >>> print(Comparison("clip", ("clip.onnx",), 4_000_000, 1e-6, 10.0, 1.0, 5.0, 6.0))
        clip.onnx: 4.0 MB, largest difference 1.0e-06 of logits up to 10.0, same class 100 %; \
5.0 ms, the model in torch 6.0 ms
    """

    name: str
    files: tuple[str, ...]
    bytes: int
    difference: float
    scale: float
    same_class: float
    milliseconds: float
    model_milliseconds: float

    def __str__(self) -> str:
        return (
            f"{' + '.join(self.files)}: {self.bytes / 1e6:.1f} MB, largest difference "
            f"{self.difference:.1e} of logits up to {self.scale:.1f}, same class "
            f"{100 * self.same_class:.0f} %; {self.milliseconds:.1f} ms, the model in torch "
            f"{self.model_milliseconds:.1f} ms"
        )


@dataclass(frozen=True)
class Export:
    """What `export` did.

    Attributes:
        folder: where the files are.
        settings: format, precision, stride, size, threads and so on.
        comparisons: one of the clip, and with a stream one of it.
        accuracy: `ca3d.export.clips.Accuracy`, or None without --check-data.
    """

    folder: Path
    settings: dict[str, Any]
    comparisons: list[Comparison]
    accuracy: Any = None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            **self.settings,
            "comparisons": [dataclasses.asdict(c) for c in self.comparisons],
            "accuracy": None if self.accuracy is None else dataclasses.asdict(self.accuracy),
        }


def export(config: ExportConfig, say: Callable[[str], None] = lambda line: None) -> Export:
    """Exports a model and runs the result.

    Args:
        config: The options; see `ExportConfig`.
        say: Called with a line about what is being done.

    Returns:
        The files and how they compare; also left in the folder as export.json.

    Raises:
        ca3d.errors.UserError: An option is not allowed, a file is there already, a package is
            missing, or the runtime can't run the model (the message says what it lacks).

    Example:
        >>> export(ExportConfig("onnx", "missing.safetensors", "exported"))
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.safetensors: no such file
    """
    config.validate()
    file = weights_file(config.weights)
    model, info = weights.load(file)
    info = dataclasses.replace(info, size=config.size or info.size)
    if not isinstance(model, CA3D):
        _refuse(config, info, model)
    elif config.stream and config.stride > model.frames:
        raise UserError(
            f"--stride must be from 1 to the model's {model.frames} frames, not {config.stride}"
        )
    backend = importlib.import_module(f"ca3d.export.to_{config.format}")
    parts = ["clip", *(STREAM_FILES if config.stream else ())]
    folder = _prepare_folder(config, parts)
    wide = model.float()
    clips = _sample_clips(config, info, wide)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        backend.write(config, wide, info, clips, Path(scratch), say)
        for part in parts:
            name = file_name(part, config.format)
            (Path(scratch) / name).replace(folder / name)
    say("running it")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        comparisons = [
            _compare(config, folder, ("clip",), _clip_pair(config, wide, backend, folder), clips)
        ]
        if config.stream:
            pair = _stream_pair(config, wide, folder)
            comparisons.append(_compare(config, folder, STREAM_FILES, pair, clips))
        measured = None
        if config.check_data is not None:
            from ca3d.export.clips import accuracy

            say(f"accuracy on {config.check_data}")
            reference, exported = _clip_pair(config, wide, backend, folder)
            measured = accuracy(
                reference,
                exported,
                info,
                config.check_data,
                split=config.check_split,
                clips=config.check_clips,
                decoder=config.decoder,
            )
    finally:
        torch.set_num_threads(threads)
    settings = {
        "weights": str(file),
        "format": config.format,
        "precision": config.precision,
        "stride": config.stride if config.stream else None,
        "size": info.size,
        "threads": config.threads,
    }
    result = Export(folder, settings, comparisons, measured)
    text = json.dumps(result.to_dict(), indent=2) + "\n"
    write_atomically(folder / "export.json", lambda path: path.write_text(text, encoding="utf-8"))
    return result


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Times functions in turn, round after round, so that a busy machine slows them alike.

    Args:
        runs: functions by name.
        rounds: timed runs of each.
        warmup: runs of each before.

    Returns:
        Seconds of every run, by name.

    Example:
        >>> list(interleaved({"nothing": lambda: None}, rounds=2))
        ['nothing']
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-warmup, rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def _refuse(config: ExportConfig, info: weights.ModelInfo, model: nn.Module) -> None:
    """Says what can't be done with a model that isn't CA3D."""
    if config.stream:
        raise UserError(
            f"--stream: {info.model} has no part that sees single frames, only CA3D models have"
        )
    if config.format == "executorch" and any(isinstance(m, nn.Conv3d) for m in model.modules()):
        raise UserError(
            f"{info.model} has 3-D convolutions, which ExecuTorch can't run on a CPU "
            "(neither its own kernels nor XNNPACK have them); export it to onnx"
        )


def _prepare_folder(config: ExportConfig, parts: list[str]) -> Path:
    folder = Path(config.out)
    names = [*(file_name(part, config.format) for part in parts), "export.json"]
    check_free(*(folder / name for name in names), force=config.force)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}") from error
    return folder


def _sample_clips(config: ExportConfig, info: weights.ModelInfo, model: nn.Module) -> list[Tensor]:
    """Clips for calibration and comparison: of the data set, or else of noise."""
    if config.calibration is not None:
        from ca3d.export.clips import calibration_clips

        return calibration_clips(info, config.calibration, config.calibration_clips, config.decoder)
    shape = (_SAMPLES, 3, info.frames, info.size, info.size)
    return list(torch.randn(shape, generator=torch.Generator().manual_seed(0)).unbind())


def _clip_pair(config: ExportConfig, model: nn.Module, backend: Any, folder: Path) -> Pair:
    regime = precision.Float32()

    @torch.no_grad()
    def reference(clips: Tensor) -> Tensor:
        return regime.forward(model, clips)

    exported: Callable[[Tensor], Tensor] = backend.classifier(
        folder / file_name("clip", config.format), config.threads
    )
    return reference, exported


def _stream_pair(config: ExportConfig, model: nn.Module, folder: Path) -> Pair:
    from ca3d.export.onnx_runtime import OnnxStream

    ours = streaming.Stream(model, config.stride)
    theirs = OnnxStream(folder, threads=config.threads)

    def through(stream: Any) -> Callable[[Tensor], Tensor]:
        def run(clips: Tensor) -> Tensor:
            """Streams whole clips; of a few frames only, goes on with the stream."""
            if clips.shape[2] < stream.window:
                stream.push(clips[0])
                return clips
            logits = []
            for clip in clips:
                stream.reset()
                logits.append(stream.push(clip))
            return torch.stack(logits)

        return run

    return through(ours), through(theirs)


def _compare(
    config: ExportConfig, folder: Path, parts: tuple[str, ...], pair: Pair, clips: list[Tensor]
) -> Comparison:
    reference, exported = pair
    batch = torch.stack(clips[:_SAMPLES])
    expected, found = reference(batch), exported(batch)
    step = batch[:1] if parts == ("clip",) else batch[:1, :, : config.stride]
    seconds = interleaved(
        {"model": lambda: reference(step), "exported": lambda: exported(step)}, config.rounds
    )
    files = tuple(file_name(part, config.format) for part in parts)
    return Comparison(
        name="clip" if parts == ("clip",) else "stream",
        files=files,
        bytes=sum((folder / name).stat().st_size for name in files),
        difference=float((expected - found).abs().max()),
        scale=float(expected.abs().max()),
        same_class=float((expected.argmax(1) == found.argmax(1)).float().mean()),
        milliseconds=1e3 * statistics.median(seconds["exported"]),
        model_milliseconds=1e3 * statistics.median(seconds["model"]),
    )
