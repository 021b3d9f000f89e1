"""Exact streaming: the logits of a sliding window without computing its frames again.

94 % of CA3D's arithmetic sees one frame, or one pair of frames, at a time. A `Stream` keeps the
results of that part for the frames that a coming window still needs, and runs the rest, which sees
the whole clip, once a window. The logits are those of the model on the whole clip: same weights, no
retraining, no approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ca3d import precision as regimes

__all__ = ["Stream"]

_PARTS = ("encode_frames", "encode_pairs", "encode_clip", "classify")


class Stream:
    """One video, frame by frame, under a window that slides over it.

    Window k covers the model's T frames from ``k * stride`` on, counted from the stream's first
    frame; it is due with its last frame. What is kept of a frame (the state):

    - With time pooled before block 3 (``pool="paper"``), block 3's spatial features of pairs of
      frames, and block 2's of the last frame. A window that starts at an even frame pairs frames
      (0, 1), (2, 3), ..., one that starts at an odd frame (1, 2), (3, 4), ...: an odd stride keeps
      both phases, an even one only the first.
    - With time pooled behind block 3's spatial half (``pool="published"``), the same of pooled
      features.

    Any number of streams may share a model, in one process; each keeps only its own state. The
    model must stay in evaluation mode, and its weights as they are until `reset`.

    Args:
        model: a `ca3d.models.CA3D` in evaluation mode, where it shall compute.
        stride: frames from one window to the next, 1 to T.
        precision: name of the regime in which the model computes (`ca3d.precision.for_inference`);
            None is "float16" for a model in float16, and otherwise plain torch.

    Attributes:
        model: the model.
        stride: frames from one window to the next.
        frames_seen: frames pushed so far.

    Raises:
        TypeError: the model has no part that sees single frames, or stride is no integer.
        ValueError: the model is in training mode, or stride is out of range.
        ca3d.errors.UserError: an unknown precision.

    Example:
        >>> import torch
        >>> from ca3d.models import ca3d_tiny
        >>> model, video = ca3d_tiny(num_classes=5).eval(), torch.randn(3, 20, 32, 32)
        >>> stream = Stream(model, stride=4)
        >>> for frame in video.unbind(1):
        ...     logits = stream.push(frame[:, None])
        ...     if logits is not None:
        ...         print(stream.frames_seen, logits.shape)
        16 torch.Size([5])
        20 torch.Size([5])
        >>> torch.allclose(logits, model(video[None, :, 4:])[0], atol=1e-5)
        True
    """

    def __init__(self, model: nn.Module, stride: int = 1, *, precision: str | None = None) -> None:
        missing = [name for name in _PARTS if not callable(getattr(model, name, None))]
        if missing:
            raise TypeError(
                f"model must be a CA3D model, whose first layers see single frames, got "
                f"{type(model).__name__} (it has no {missing[0]})"
            )
        if isinstance(stride, bool) or not isinstance(stride, int):
            raise TypeError(f"stride must be an integer, got {stride!r}")
        parts: Any = model
        self.model = parts
        self.window: int = parts.frames
        if not 1 <= stride <= self.window:
            raise ValueError(
                f"stride must be from 1 to the model's {self.window} frames, got {stride}"
            )
        self.stride = stride
        self._check_mode()
        if precision is None and next(parts.parameters()).dtype == torch.float16:
            precision = "float16"
        self._regime = regimes.Regime() if precision is None else regimes.for_inference(precision)
        half = isinstance(self._regime, regimes.Float16)
        if precision is not None and half != (next(parts.parameters()).dtype == torch.float16):
            raise ValueError(
                f"precision {precision!r} does not fit a model in {next(parts.parameters()).dtype}"
            )
        # A unit is what `encode_pairs` makes one frame of: a pair, or a single frame where the
        # model has no time pool. Units are numbered by their last frame.
        self._span: int = parts.frames_per_unit
        self._spacing = math.gcd(stride, self._span)
        self._slots = (self.window - self._span) // self._spacing + 1
        self.reset()

    def reset(self) -> None:
        """Forgets all frames: the next one is the first of a new video, of any size."""
        self.frames_seen = 0
        self._size: tuple[int, int] | None = None
        # In the physical order of the models' layout, the channels last.
        self._units: Tensor | None = None  # (slots, h', w', C')
        self._last: Tensor | None = None  # (h, w, C), of the last frame by itself

    def push(self, frames: Tensor) -> Tensor | None:
        """Takes the next frames of the video.

        Args:
            frames: (3, n, H, W), normalised as the model's training clips were, floating, on any
                device; n is at least 1. `ca3d.predict.Predictor.prepare` makes them from uint8.

        Returns:
            Logits (num_classes,), float32, of the newest window whose last frame is among these;
            None when there is none. Several windows that become due in one push give the newest
            only, and frames that no later window needs either are not computed: what follows is as
            if they had been pushed one by one.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: another shape than (3, n, H, W), an H or W that differs from the frames
                before, or a model in training mode.
        """
        return self.push_together([self], [frames])[0]

    @staticmethod
    @torch.no_grad()
    def push_together(streams: Sequence[Stream], frames: Sequence[Tensor]) -> list[Tensor | None]:
        """Takes the next frames of several videos, in one batch.

        Args:
            streams: different streams of one model, in one precision; their strides may differ.
            frames: what `push` takes, for each stream; one H and W for all. A stream without new
                frames is left out.

        Returns:
            What `push` returns, for each stream.

        Raises:
            TypeError, ValueError: as `push`; also streams that can't share a batch. No stream has
                then taken a frame.

        Example:
            >>> import torch
            >>> from ca3d.models import ca3d_tiny
            >>> model = ca3d_tiny(num_classes=5).eval()
            >>> cameras = [Stream(model), Stream(model)]
            >>> logits = Stream.push_together(cameras, [torch.zeros(3, 16, 32, 32)] * 2)
            >>> [x.shape for x in logits]
            [torch.Size([5]), torch.Size([5])]
        """
        _check_together(streams, frames)
        if not streams:
            return []
        model, regime = streams[0].model, streams[0]._regime
        like = next(model.parameters())
        plans = [stream._plan(x.shape[1]) for stream, x in zip(streams, frames, strict=True)]
        new = [
            x[:, plan.skipped :].to(like.device, like.dtype)
            for plan, x in zip(plans, frames, strict=True)
        ]
        with regime.autocast(like.device.type):
            singles = _encode(model.encode_frames, new, 1)
            pairs = [
                stream._pairs(plan, single)
                for stream, plan, single in zip(streams, plans, singles, strict=True)
            ]
            units = _encode(model.encode_pairs, pairs, streams[0]._span)
            windows = []
            for stream, plan, x, single, unit in zip(
                streams, plans, frames, singles, units, strict=True
            ):
                windows += stream._store(plan, single, unit)
                stream._size = (x.shape[2], x.shape[3])
            if not windows:
                return [None] * len(plans)
            # Physically (B, T, h, w, C).
            clip = torch.stack(windows).movedim(-1, 1)
            logits = iter(model.classify(model.encode_clip(clip)).float().unbind())
        return [None if plan.newest is None else next(logits) for plan in plans]

    @property
    def memory_bytes(self) -> int:
        """Bytes of the state; 0 before the first frame has shown its size.

        Example:
            >>> import torch
            >>> from ca3d.models import ca3d_tiny
            >>> stream = Stream(ca3d_tiny(num_classes=5).eval())
            >>> _ = stream.push(torch.zeros(3, 2, 32, 32))
            >>> stream.memory_bytes == 4 * (15 * 32 * 4 * 4 + 16 * 8 * 8)
            True
        """
        return sum(x.nbytes for x in (self._units, self._last) if x is not None)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies the state into contiguous tensors that safetensors can store.

        Returns:
            ``"position"``: int64, frames seen, stride, T, H, W (0, 0 before the first frame). After
            the first frame also ``"units"``, (slots, h', w', C'), a ring of the features of pairs
            by the number of their last frame, and ``"last"``, (h, w, C), the last frame's.
        """
        height, width = self._size or (0, 0)
        position = [self.frames_seen, self.stride, self.window, height, width]
        state = {"position": torch.tensor(position)}
        for name, tensor in (("units", self._units), ("last", self._last)):
            if tensor is not None:
                state[name] = tensor.clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on where the stream that wrote a state was.

        Args:
            state: what `state_dict` of a stream with this model, stride and precision returned.

        Raises:
            ValueError: the state is of another stride, model or precision, or is no state. The
                stream is then as it was.
        """
        position = state.get("position") if isinstance(state, Mapping) else None
        if (
            not isinstance(position, Tensor)
            or position.shape != (5,)
            or position.dtype != torch.int64
        ):
            raise ValueError("state must be what Stream.state_dict returned: position is not in it")
        seen, stride, window, height, width = position.tolist()
        for name, value, own in (("stride", stride, self.stride), ("frames", window, self.window)):
            if value != own:
                raise ValueError(f"the state has {name} {value}, this stream has {own}")
        fresh = Stream.__new__(Stream)
        fresh.__dict__.update(self.__dict__)
        fresh.reset()
        if seen:
            # A blank video of this size shows the shapes and dtypes that belong here.
            fresh.push(self._blank(height, width))
        expected = fresh.state_dict()
        del expected["position"]
        given = {name: x for name, x in state.items() if name != "position"}
        for name in sorted(expected.keys() | given.keys()):
            if name not in given or name not in expected:
                fault = "is missing" if name in expected else "is unknown"
                raise ValueError(f"the state does not fit this stream: {name} {fault}")
            ours, theirs = expected[name], given[name]
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
                raise ValueError(
                    f"the state does not fit this stream: {name} is {tuple(theirs.shape)} "
                    f"{theirs.dtype}, this model and precision have {tuple(ours.shape)} "
                    f"{ours.dtype}"
                )
        device = next(self.model.parameters()).device
        self.frames_seen, self._size = seen, (height, width) if seen else None
        with torch.inference_mode(False):
            copies = {name: x.to(device, copy=True).contiguous() for name, x in given.items()}
        self._units, self._last = copies.get("units"), copies.get("last")

    def _blank(self, height: int, width: int) -> Tensor:
        like = next(self.model.parameters())
        return torch.zeros(3, self._span, height, width, dtype=like.dtype, device=like.device)

    def _check_mode(self) -> None:
        if self.model.training:
            raise ValueError("model must be in evaluation mode (model.eval()) to stream")

    def _check(self, frames: Any) -> None:
        if not isinstance(frames, Tensor) or not frames.is_floating_point():
            kind = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
            raise TypeError(
                f"frames must be a floating-point tensor (normalised), got {kind}; "
                "Predictor.prepare makes one from uint8"
            )
        if frames.dim() != 4 or frames.shape[0] != 3 or min(frames.shape) < 1:
            raise ValueError(
                "frames must have the shape (3, frames, height, width) without empty dimensions, "
                f"got {tuple(frames.shape)}"
            )
        height, width = frames.shape[2:]
        if self._size is not None and (height, width) != self._size:
            raise ValueError(
                f"frames are {height} x {width} pixels, those before were {self._size[0]} x "
                f"{self._size[1]}; reset() begins a new video"
            )
        self._check_mode()

    def _plan(self, count: int) -> _Plan:
        """Which of the next `count` frames and units are computed."""
        start, stop, full = self.frames_seen, self.frames_seen + count, self.window - 1
        # The last window that ends in front of `stop`, if it isn't an old one.
        newest = full + (stop - 1 - full) // self.stride * self.stride
        due = newest >= max(start, full)
        # The oldest window that is still wanted, and its first frame.
        oldest = newest if due else self._next_due(start)
        first = max(oldest - full, start)
        # A window that begins behind `start` has no use for the pair of its first frame and the
        # frame in front of it.
        begin = start if first == start else first + self._span - 1
        units = [unit for unit in range(begin, stop) if self._needs(unit, oldest)]
        return _Plan(start, stop, newest if due else None, first - start, units)

    def _next_due(self, frame: int) -> int:
        """Last frame of the first window that ends at `frame` or later."""
        full = self.window - 1
        return full + max(0, -((full - frame) // self.stride)) * self.stride

    def _needs(self, unit: int, oldest: int) -> bool:
        """Whether a window that ends at `oldest` or later holds the unit that ends at `unit`."""
        end = max(self._next_due(unit), oldest)
        if (end - unit) % self._span:
            end += self.stride
        return (end - unit) % self._span == 0 and end - unit <= self.window - self._span

    def _pairs(self, plan: _Plan, singles: Tensor) -> Tensor:
        """The frames of the units to compute, (C, units * span, h, w)."""
        chosen = []
        for unit in plan.units:
            for frame in range(unit - self._span + 1, unit + 1):
                index = frame - plan.start - plan.skipped
                if index < 0:
                    assert self._last is not None
                    chosen.append(self._last)
                else:
                    chosen.append(singles[index])
        pairs = torch.stack(chosen) if chosen else singles[:0]
        return pairs.permute(3, 0, 1, 2)

    def _store(self, plan: _Plan, singles: Tensor, units: Tensor) -> list[Tensor]:
        """Keeps new features; returns the newest window (T', h', w', C') if one is due."""
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            if self._span > 1:
                self._last = singles[-1].clone(memory_format=torch.contiguous_format)
            if self._units is None and plan.units:
                self._units = units.new_zeros((self._slots, *units.shape[1:]))
        # Units behind the newest window take the places of units in it.
        split = sum(plan.newest is not None and unit <= plan.newest for unit in plan.units)
        self._write(plan.units[:split], units[:split])
        windows = []
        if plan.newest is not None:
            assert self._units is not None
            first = plan.newest - self.window + self._span
            inside = range(first, plan.newest + 1, self._span)
            windows.append(self._units[[self._slot(unit) for unit in inside]])
        self._write(plan.units[split:], units[split:])
        self.frames_seen = plan.stop
        return windows

    def _write(self, numbers: list[int], units: Tensor) -> None:
        if numbers:
            assert self._units is not None
            self._units[[self._slot(unit) for unit in numbers]] = units

    def _slot(self, unit: int) -> int:
        return unit // self._spacing % self._slots


@dataclass(frozen=True)
class _Plan:
    """What a push computes.

    Args:
        start, stop: numbers of the first new frame and of the one after the last.
        newest: last frame of the newest window that becomes due, or None.
        skipped: how many of the new frames come before all windows that are still wanted.
        units: units to compute, by the number of their last frame.
    """

    start: int
    stop: int
    newest: int | None
    skipped: int
    units: list[int]


def _encode(part: Callable[[Tensor], Tensor], clips: list[Tensor], span: int) -> list[Tensor]:
    """A part of the model, in one call, over clips (C, T, h, w); gives (T / span, h', w', C')."""
    counts = [clip.shape[1] // span for clip in clips]
    joined = clips[0] if len(clips) == 1 else torch.cat(clips, 1)
    if not joined.shape[1]:
        return [joined.permute(1, 2, 3, 0) for _ in clips]
    features = part(joined[None])[0].permute(1, 2, 3, 0)
    return list(features.split(counts))


def _check_together(streams: Sequence[Stream], frames: Sequence[Tensor]) -> None:
    if len(streams) != len(frames):
        raise ValueError(f"got {len(streams)} streams and frames for {len(frames)}")
    if len({id(stream) for stream in streams}) != len(streams):
        raise ValueError("streams must differ; one of them is given twice")
    for stream, x in zip(streams, frames, strict=True):
        stream._check(x)
        if stream.model is not streams[0].model:
            raise ValueError("streams must share one model to be computed together")
        if type(stream._regime) is not type(streams[0]._regime):
            raise ValueError(
                f"streams must share one precision to be computed together, got "
                f"{streams[0]._regime} and {stream._regime}"
            )
        if x.shape[2:] != frames[0].shape[2:]:
            raise ValueError(
                f"frames of all streams must have one size, got {tuple(frames[0].shape[2:])} and "
                f"{tuple(x.shape[2:])}"
            )
