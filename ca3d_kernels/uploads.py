"""Small tables and numbers that kernels read on a GPU: how they get there without a wait."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ca3d_kernels import cuda


class Uploads:
    """Copies on a device of what is made on the CPU, kept until it changes.

    They go through pinned memory, so that the CPU doesn't wait. A copy that is captured in a CUDA
    graph reads its source again at every replay, and holds nothing before the first: it serves
    that capture alone, and its source must live as long as the graph.

    Attributes:
        captured: sources of captured copies.

    Example:
        >>> uploads = Uploads()
        >>> make = lambda: torch.ones(2)
        >>> first = uploads.get("ones", 2, make, torch.device("cpu"))
        >>> uploads.get("ones", 2, make, torch.device("cpu")) is first
        True
    """

    def __init__(self) -> None:
        self.captured: list[Tensor] = []
        self._kept: dict[str, tuple[Any, Tensor]] = {}

    def get(
        self, name: str, contents: Any, make: Callable[[], Tensor], device: torch.device
    ) -> Tensor:
        """The copy of a table on a device.

        Args:
            name: of the table.
            contents: what it depends on; a table whose contents are still equal is not copied
                again.
            make: makes it on the CPU.
            device: where it is wanted.
        """
        capturing = cuda.is_capturing(device)
        if not capturing and name in self._kept:
            known, copy = self._kept[name]
            if known == contents:
                return cuda.used_here(copy)
        source = make()
        if device.type == "cuda":
            source = source.pin_memory()
        copy = source.to(device, non_blocking=True)
        if capturing:
            self.captured.append(source)
        else:
            self._kept[name] = (contents, copy)
        return copy
