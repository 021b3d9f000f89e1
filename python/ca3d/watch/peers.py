"""Whom this process is connected with: with the camera, and with nobody that it names."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from ca3d.errors import UserError


def open_sockets() -> set[int]:
    """Returns the numbers of this process's open files that are sockets.

    Example:
        >>> with socket.socket() as mine:
        ...     mine.fileno() in open_sockets()
        True
    """
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.add(int(name))
        except OSError:  # The folder's own number is gone by now.
            continue
    return found


def check_peers(url: str, sockets: set[int]) -> None:
    """Refuses a camera that has sent the decoder on to another machine.

    RTSP lets a server redirect its clients, and FFmpeg follows.

    Args:
        url: The camera's address.
        sockets: Open sockets of this process.

    Raises:
        ca3d.errors.UserError: One of them is connected with another machine.
    """
    host = urlsplit(url).hostname or ""
    try:
        known = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        known = set()
    for number in sockets:
        with socket.socket(fileno=os.dup(number)) as copy:
            if copy.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            try:
                peer = copy.getpeername()[0]
            except OSError:  # Not connected: it receives what the camera sends.
                continue
            if peer.removeprefix("::ffff:") not in known:
                raise UserError(
                    f"{url}: the camera sends us on to {peer}, which is refused; give that address"
                    " if it is yours"
                )
