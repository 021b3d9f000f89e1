"""Data sets that the package renders itself, without a download."""

from ca3d.data.embedded.maker import describe, make, names

__all__ = ["describe", "make", "names"]
