"""A camera's user name and password: where they come from, and that nothing ever prints them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from ca3d.errors import UserError

USER_VARIABLE, PASSWORD_VARIABLE = "CA3D_CAMERA_USER", "CA3D_CAMERA_PASSWORD"
HIDDEN = "***"

# Up to the last @ of a word: a password may hold one itself.
_USER_INFO = re.compile(r"(?<=://)[^\s'\"<>]*@")
# The same of an address whose scheme is missing or mistyped: ann:secret@host, rtsp:/ann:secret@host
_BARE_USER_INFO = re.compile(r"[^\s'\"<>/:@]+:[^\s'\"<>/]*@(?=[\w\[])")
# Cameras that take the password in the address: rtsp://host/user=admin&password=secret
_PARAMETER = re.compile(
    r"(?i)((?<=[?&;/])[\w-]*(?:user|usr|pass|pwd|pw|token|auth|key|secret|login)[\w-]*=)"
    r"[^&\s'\"/<>]+"
)


@dataclass(frozen=True)
class Credentials:
    """A user name and a password, which `repr` does not show.

    Example:
        >>> Credentials("ann", "secret")
        Credentials()
    """

    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return bool(self.user or self.password)


def find_credentials(file: str | None, environment: Mapping[str, str] | None = None) -> Credentials:
    """Reads credentials from a file, else from the environment.

    Args:
        file: One line `user:password`, readable by its owner only; None for the environment.
        environment: Variables; None for those of the process.

    Returns:
        The credentials, empty where there are none.

    Raises:
        ca3d.errors.UserError: The file is missing, malformed, or others may read it.

    Example:
        >>> find_credentials(None, {"CA3D_CAMERA_USER": "ann"}).user
        'ann'
    """
    if file is None:
        variables = os.environ if environment is None else environment
        return Credentials(variables.get(USER_VARIABLE, ""), variables.get(PASSWORD_VARIABLE, ""))
    path = Path(file)
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"--credentials {file}: cannot be read ({reason})") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"--credentials {file}: others may read it; run: chmod 600 {file}")
    user, colon, password = text.partition(":")
    if not colon or "\n" in text or not user:
        raise UserError(f"--credentials {file}: must hold one line, user:password")
    return Credentials(user, password)


def split_url(url: str) -> tuple[str, Credentials]:
    """Takes user name and password out of an address.

    Args:
        url: Such as rtsp://ann:secret@host/stream.

    Returns:
        The address without them, and the credentials, empty where there are none.

    Raises:
        ca3d.errors.UserError: It is no address; the message does not repeat it.

    Example:
        >>> split_url("rtsp://ann:secret@host:554/stream")[0]
        'rtsp://host:554/stream'
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
        fine = "@" not in parts.fragment
    except ValueError:
        fine = False
    if not fine:
        raise UserError(
            "the camera's address must be rtsp://HOST:PORT/PATH with a port of at most 65535; a"
            " password with one of #[]/? in it belongs into --credentials"
        )
    information, _, host = parts.netloc.rpartition("@")
    user, _, password = information.partition(":")
    bare = urlunsplit((parts.scheme, host, parts.path, parts.query, parts.fragment))
    return bare, Credentials(unquote(user), unquote(password))


def with_credentials(url: str, credentials: Credentials) -> str:
    """Puts user name and password into an address, for the decoder only.

    Args:
        url: An address without them.
        credentials: May be empty.
    """
    if not credentials:
        return url
    parts = urlsplit(url)
    user, password = quote(credentials.user, safe=""), quote(credentials.password, safe="")
    return urlunsplit(
        (parts.scheme, f"{user}:{password}@{parts.netloc}", parts.path, parts.query, parts.fragment)
    )


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Hides what must not be seen in a text that is going to be printed or stored.

    User names and passwords in addresses go, parameters of an address that look like them, and the
    given secrets wherever they stand.

    Args:
        text: Any text, such as the message of an exception.
        secrets: Passwords; empty ones are left out of account.

    Example:
        >>> redact("refused: 'rtsp://ann:sec@ret@host/a?password=secret'")
        "refused: 'rtsp://***@host/a?password=***'"
    """
    text = _BARE_USER_INFO.sub(f"{HIDDEN}@", _USER_INFO.sub(f"{HIDDEN}@", text))
    text = _PARAMETER.sub(rf"\g<1>{HIDDEN}", text)
    for secret in secrets:
        for form in {secret, quote(secret, safe=""), quote(secret)}:
            # A password of a letter or two would blot out every message, and hide nothing.
            if len(form) > 2:
                text = text.replace(form, HIDDEN)
    return text
