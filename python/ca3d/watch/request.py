"""What the decoding process is asked for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

from ca3d.watch.credentials import Credentials, redact, with_credentials

Kind = Literal["file", "webcam", "rtsp"]


@dataclass(frozen=True)
class Request:
    """One source, and how its frames are wanted.

    Attributes:
        kind: "file", "webcam" or "rtsp".
        address: Path, device or address, without credentials.
        view: Region of the frames, as `ca3d.data.view.View` writes it.
        resize: Shorter side of that region in pixels, before the centre crop.
        size: Side of the square frames that are wanted.
        stride: Frames from one wanted frame to the next, at `frames_per_second`.
        frames_per_second: The model's rate; None for the source's own.
        paced: Whether a file is read no faster than it plays.
        begin: Seconds of a file to leave out.
        timeout: Seconds to wait for a camera.
        memory_mb: Megabytes of data that the process may use.
        transport: How RTSP brings the frames, "tcp" or "udp".
        credentials: For the camera; not shown.
    """

    kind: Kind
    address: str
    view: str = "center"
    resize: int = 112
    size: int = 112
    stride: int = 2
    frames_per_second: float | None = None
    paced: bool = False
    begin: float = 0.0
    timeout: float = 10.0
    memory_mb: int = 1024
    transport: str = "tcp"
    credentials: Credentials = field(default_factory=Credentials, repr=False)

    @property
    def live(self) -> bool:
        """Whether frames come at their own pace and must not be kept waiting."""
        return self.paced or self.kind != "file"

    @property
    def url(self) -> str:
        """The address with the credentials in it, for the decoder only."""
        return with_credentials(self.address, self.credentials)

    def redact(self, text: str) -> str:
        """Hides the credentials in a text; see `ca3d.watch.credentials.redact`."""
        return redact(text, (self.credentials.password,))

    @property
    def name(self) -> str:
        """The address as it may be shown and stored."""
        return self.redact(self.address)

    def to_json(self) -> str:
        """The request as one line, credentials included: for a pipe, never for a file.

        Example:
            >>> Request.from_json(Request("file", "a.mp4").to_json()).address
            'a.mp4'
        """
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """The request of a line that `to_json` made."""
        fields = json.loads(text)
        return cls(**{**fields, "credentials": Credentials(**fields["credentials"])})
