"""Models for other runtimes: ONNX Runtime and ExecuTorch."""

from __future__ import annotations

__all__ = ["STREAM_FILES", "file_name"]

#: The parts of a stream, in the order in which they run.
STREAM_FILES = ("encoder", "head")


def file_name(part: str, format: str = "onnx") -> str:
    """Name of a part's file in the folder of an export.

    Args:
        part: ``"clip"``, ``"encoder"`` or ``"head"``.
        format: ``"onnx"`` or ``"executorch"``.

    Example:
        >>> file_name("clip"), file_name("clip", "executorch")
        ('clip.onnx', 'clip.pte')
    """
    return f"{part}.{'onnx' if format == 'onnx' else 'pte'}"
