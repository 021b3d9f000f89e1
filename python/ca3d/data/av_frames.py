"""What every use of PyAV here has in common: which containers, upright frames, scaling."""

from typing import Any

import av
import numpy as np

# Containers that hold their frames themselves. Left out on purpose: hls, dash, concat, sdp, rtsp,
# image sequences, lavfi and whatever else opens further files or addresses.
_CONTAINERS = "asf,avi,flv,gif,matroska,webm,mov,mp4,3gp,3g2,mj2,mpeg,mpegts,mpegvideo,ogg"
FILE_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}

# Colour conversion on one thread: a reader in a DataLoader worker must not start more. Older PyAV
# knows no other way.
SCALER = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


def is_cover(stream: Any) -> bool:
    """Whether a video stream is the cover picture of an audio file.

    Args:
        stream: A PyAV video stream.
    """
    disposition = stream.disposition
    return bool(disposition & type(disposition).attached_pic)


def orientation(frame: Any) -> np.ndarray:
    """Returns the 2x2 matrix of -1, 0, 1 by which a camera asks a frame to be turned and flipped.

    It maps (x, y) of a stored pixel, as the row vector (x, y) @ matrix, to the upright picture.
    Angles between are rounded to the nearest quarter turn.

    Args:
        frame: A decoded PyAV frame.

    Example:
        >>> orientation(av.VideoFrame(16, 16, "gray")).tolist()
        [[1, 0], [0, 1]]
    """
    identity = np.eye(2, dtype=np.int64)
    for data in frame.side_data:
        if "DISPLAYMATRIX" in str(data.type):
            a, b, _, c, d, *_ = np.frombuffer(bytes(data), dtype=np.int32)[:9].astype(np.float64)
            matrix = np.asarray([[a, b], [c, d]])
            largest = np.abs(matrix).max()
            if largest == 0:
                return identity
            quarter = np.rint(matrix / largest)
            valid = np.abs(np.linalg.det(quarter)) == 1 and np.abs(quarter).sum() == 2
            return quarter.astype(np.int64) if valid else identity
    return identity


def upright(image: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Turns and flips a stored image as `orientation` says.

    Args:
        image: (H, W, channels).
        turn: The matrix.

    Returns:
        (H, W, channels), or (W, H, channels) after a quarter turn.

    Example:
        >>> image = np.arange(6).reshape(2, 3, 1)
        >>> upright(image, np.asarray([[0, 1], [-1, 0]]))[..., 0].tolist()
        [[3, 0], [4, 1], [5, 2]]
    """
    (a, b), (c, d) = turn
    if a == 0:
        # Rows become columns: x' = c y and y' = b x.
        image, a, d = image.transpose(1, 0, 2), c, b
    if a < 0:
        image = image[:, ::-1]
    if d < 0:
        image = image[::-1]
    return np.ascontiguousarray(image)
