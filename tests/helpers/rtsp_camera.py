"""A little RTSP camera on this machine: MPEG-4 over one TCP connection, with a password."""

import base64
import io
import socket
import struct
import threading
import time
from collections.abc import Iterator

import av
import numpy as np

RATE = 10
_CLOCK = 90000
_PACKET_BYTES = 1200


def encoded(frames: np.ndarray) -> list[bytes]:
    """(T, H, W, 3) frames as MPEG-4 pictures that each stand alone."""
    packets = []
    with av.open(io.BytesIO(), "w", format="m4v") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            packets += [bytes(packet) for packet in stream.encode(picture)]
        packets += [bytes(packet) for packet in stream.encode()]
    return packets


class RtspCamera:
    """Serves the pictures once to everybody who connects, then closes the connection.

    Args:
        pictures: What `encoded` returned; a tuple of them changes from connection to connection.
        user_password: "user:password" that it asks for, or None.
        pace: Seconds from picture to picture.
        location: Where it redirects everybody, or None.
        host: Where it listens.
    """

    def __init__(
        self,
        *pictures: list[bytes],
        user_password: str | None = None,
        pace: float = 0.02,
        location: str | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.pictures, self.user_password, self.pace = pictures, user_password, pace
        self.location, self.host = location, host
        self.connections = self.plays = 0
        self.requests: list[str] = []
        self._socket = socket.create_server((host, 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def url(self) -> str:
        return f"rtsp://{self.host}:{self.port}/stream"

    def __enter__(self) -> "RtspCamera":
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            try:
                for request in _requests(lines):
                    self.requests.append(request)
                    if not self._answer(connection, request):
                        return
            except OSError:
                return

    def _answer(self, connection: socket.socket, request: str) -> bool:
        method, address = request.split()[:2]
        number = next(
            line.split(":")[1].strip() for line in request.splitlines() if line.startswith("CSeq")
        )
        head, body = {}, ""
        status = "200 OK"
        if self.location is not None and method != "OPTIONS":
            status, head = "302 Moved Temporarily", {"Location": self.location}
        elif not self._allowed(request):
            status, head = "401 Unauthorized", {"WWW-Authenticate": 'Basic realm="camera"'}
        elif method == "OPTIONS":
            head = {"Public": "OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN"}
        elif method == "DESCRIBE":
            head = {"Content-Type": "application/sdp", "Content-Base": address + "/"}
            body = (
                "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\n"
                "m=video 0 RTP/AVP 96\r\na=rtpmap:96 MP4V-ES/90000\r\na=control:track1\r\n"
            )
        elif method == "SETUP":
            head = {"Transport": "RTP/AVP/TCP;unicast;interleaved=0-1", "Session": "1"}
        elif method == "PLAY":
            head = {"Session": "1"}
        head["Content-Length"] = str(len(body))
        lines = [f"RTSP/1.0 {status}", f"CSeq: {number}", *(f"{k}: {v}" for k, v in head.items())]
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n" + body).encode())
        if method == "PLAY" and status.startswith("200"):
            self._play(connection)
            return False
        return True

    def _allowed(self, request: str) -> bool:
        if self.user_password is None or request.startswith("OPTIONS"):
            return True
        token = base64.b64encode(self.user_password.encode()).decode()
        return f"Authorization: Basic {token}" in request

    def _play(self, connection: socket.socket) -> None:
        pictures = self.pictures[min(self.plays, len(self.pictures) - 1)]
        self.plays += 1
        sequence = 0
        for number, picture in enumerate(pictures):
            parts = [picture[i : i + _PACKET_BYTES] for i in range(0, len(picture), _PACKET_BYTES)]
            for part in parts:
                last = part is parts[-1]
                stamp = number * _CLOCK // RATE
                header = struct.pack(">BBHII", 0x80, 96 | last << 7, sequence & 0xFFFF, stamp, 1)
                payload = header + part
                connection.sendall(b"$\0" + struct.pack(">H", len(payload)) + payload)
                sequence += 1
            time.sleep(self.pace)


def _requests(lines: io.BufferedReader) -> Iterator[str]:
    request: list[str] = []
    while line := lines.readline():
        text = line.decode(errors="replace").rstrip("\r\n")
        if text:
            request.append(text)
        elif request:
            yield "\n".join(request)
            request = []
