"""What the user named as the source: files, a webcam, or a camera on the network."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from urllib.parse import urlsplit

from ca3d.data.reader import check_file
from ca3d.errors import UserError
from ca3d.predict import find_videos
from ca3d.watch.credentials import find_credentials, redact, split_url
from ca3d.watch.options import WatchConfig
from ca3d.watch.request import Kind, Request


def find_sources(
    config: WatchConfig, view: str, size: int, resize: int, stride: int, rate: float | None
) -> list[Request]:
    """Turns SOURCE into requests.

    Args:
        config: The options.
        view: Region to look at.
        size: The model's frame size.
        resize: Shorter side before the crop.
        stride: Frames of the model's rate from one of its frames to the next.
        rate: The model's frame rate, None for the source's.

    Returns:
        One request; for a folder one for every video in it.

    Raises:
        ca3d.errors.UserError: There is no such source, or its kind is not supported.

    Example:
        >>> find_sources(WatchConfig("0"), "center", 112, 112, 2, 25.0)[0].address
        '/dev/video0'
    """

    def request(kind: Kind, address: str, **fields: object) -> Request:
        return Request(
            kind=kind,
            address=address,
            view=view,
            resize=resize,
            size=size,
            stride=stride,
            frames_per_second=rate,
            paced=config.realtime and kind == "file",
            timeout=config.timeout,
            memory_mb=config.decoder_memory,
            transport=config.transport,
            **fields,  # type: ignore[arg-type]
        )

    source = config.source
    if re.fullmatch(r"\d+", source):
        return [request("webcam", f"/dev/video{int(source)}")]
    if re.match(r"(?i)rtsps?://", source):
        url, inside = split_url(source[: source.index(":")].lower() + source[source.index(":") :])
        if not urlsplit(url).hostname:
            raise UserError(f"{redact(source)}: names no camera")
        given = find_credentials(config.credentials)
        return [request("rtsp", url, credentials=inside or given)]
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        raise UserError(
            f"{redact(source)}: only rtsp:// and rtsps:// addresses are watched; nothing else is"
            " opened over the network"
        )
    path = Path(source)
    if path.exists() and stat.S_ISCHR(os.stat(path).st_mode):
        return [request("webcam", str(path))]
    if path.is_dir():
        return [request("file", str(file)) for file in find_videos(path)]
    return [request("file", str(check_file(path)))]


def password_in_address(source: str) -> bool:
    """Whether an address holds a password, which every user of the machine can then see.

    Example:
        >>> password_in_address("rtsp://ann:secret@host/stream")
        True
    """
    return "://" in source and bool(split_url(source)[1].password)
