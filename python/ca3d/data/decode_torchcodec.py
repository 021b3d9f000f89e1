"""Video frames through torchcodec, for machines that have it (and an FFmpeg of their own)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from ca3d.data.reader import INSTALL_AV, VideoError, VideoReader
from ca3d.data.view import short_side_size

_CHUNK = 64


class TorchCodecReader(VideoReader):
    """Reads a video file through torchcodec.

    Unlike PyAV it takes any container that the machine's FFmpeg knows; what opens other files is
    kept out by `ca3d.data.reader.check_file`, which looks at the file's first bytes.

    Args:
        path: The file, checked by `ca3d.data.reader.check_file`.
        threads: Decoding threads, 0 for the decoder's choice.

    Raises:
        VideoError: torchcodec does not load; the file is no video, or has no frames.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.path = path
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, RuntimeError, OSError) as error:
            raise VideoError(
                f"{path}: torchcodec is not installed, use PyAV: {INSTALL_AV}"
            ) from error
        try:
            self._decoder: Any = VideoDecoder(
                str(path.absolute()), dimension_order="NHWC", num_ffmpeg_threads=threads
            )
            data = self._decoder.metadata
            self.num_frames = int(data.num_frames or 0)
        except (RuntimeError, ValueError, TypeError) as error:
            if "libtorchcodec" in str(error):
                raise VideoError(
                    f"{path}: torchcodec finds no FFmpeg libraries: install ffmpeg, or use PyAV: "
                    f"{INSTALL_AV}"
                ) from error
            raise VideoError(
                f"{path}: not a readable video file, or a damaged one: play it in a video player, "
                "or copy or download it again"
            ) from error
        if self.num_frames < 1:
            raise VideoError(
                f"{path}: holds no frames: the recording was cut off or never finished"
            )
        self.width, self.height = int(data.width or 0), int(data.height or 0)
        self.frames_per_second = float(data.average_fps or 25.0)
        self._begin = float(data.begin_stream_seconds or 0.0)
        self.duration = self.num_frames / self.frames_per_second
        if data.end_stream_seconds is not None:
            self.duration = float(data.end_stream_seconds) - self._begin
        self._times: np.ndarray | None = None

    def times(self) -> np.ndarray:
        """Returns the begin of every frame in seconds, float64 (num_frames,), increasing.

        torchcodec tells times only of decoded frames: the first call decodes the whole video.
        """
        if self._times is None:
            parts = [
                self._batch(list(range(start, min(start + _CHUNK, self.num_frames))))[1]
                for start in range(0, self.num_frames, _CHUNK)
            ]
            self._times = np.concatenate(parts) - self._begin
        return self._times

    def close(self) -> None:
        """Closes the file; a closed reader reads no more frames."""
        self._decoder = None

    def _decode(self, indices: list[int], short_side: int | None) -> dict[int, np.ndarray]:
        if self._decoder is None:
            raise ValueError(f"{self.path}: the reader is closed")
        if not indices:
            return {}
        images = torch.from_numpy(self._batch(indices)[0])
        size = short_side_size(images.shape[2], images.shape[1], short_side)
        if size != (images.shape[2], images.shape[1]):
            chw = images.permute(0, 3, 1, 2)
            images = F.resize(chw, [size[1], size[0]], antialias=True).permute(0, 2, 3, 1)
        return dict(zip(indices, images.numpy(), strict=True))

    def _batch(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Decodes frames; one that the file does not hold is the nearest earlier one."""
        decoder = self._decoder
        try:
            batch = decoder.get_frames_at(indices)
            return batch.data.numpy(), batch.pts_seconds.numpy()
        except (RuntimeError, IndexError):
            pass
        images, times = [], []
        for index in indices:
            frame = None
            while frame is None and index >= 0:
                try:
                    frame = decoder.get_frame_at(index)
                except (RuntimeError, IndexError):
                    index -= 1
            if frame is None:
                raise VideoError(
                    f"{self.path}: no frame can be decoded: the file is damaged, or its codec "
                    "unsupported"
                )
            images.append(frame.data.numpy())
            times.append(frame.pts_seconds)
        return np.stack(images), np.asarray(times)
