"""Public data sets with official splits, and the protocols by which a result is measured.

Example:
    >>> from ca3d.data.benchmarks import names
    >>> names()
    ['ucf101', 'hmdb51', 'kinetics400']
"""

from ca3d.data.benchmarks.partition import Partition, partition
from ca3d.data.benchmarks.protocol import Protocol, published_split
from ca3d.data.benchmarks.registry import names

__all__ = ["Partition", "Protocol", "names", "partition", "published_split"]
