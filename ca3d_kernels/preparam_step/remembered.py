"""What a step leaves for the next search for overflows: how large theta and momentum became.

With the largest magnitudes of each stretch of elements the search need read little but gradients.
They are kept in `Batch.cache`, and count as long as nobody else has written the tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ca3d_kernels import cuda
from ca3d_kernels.preparam_step.op import Batch

T = TypeVar("T")

# Set in the cache of tensors that replays of a CUDA graph may step: their versions tell nothing.
REPLAYED = "replayed"


def known(batch: Batch, layout: Any = None) -> Any | None:
    """The largest magnitudes that the last step left; None if its tensors may have changed since.

    Args:
        batch: about to be searched.
        layout: how its tensors are cut into stretches, if not always alike.

    Example:
        >>> from ca3d_kernels.preparam_step.reference import Hyperparameters
        >>> w, g, theta = ([torch.ones(3)] for _ in range(3))
        >>> batch = Batch(w, g, theta, [], Hyperparameters(lr=0.5), 128.0, 1.0, cache={})
        >>> with leaving(batch, lambda: [torch.nan]) as largest:
        ...     largest[0] = 0.5
        >>> torch.autograd.graph.increment_version(batch.written())
        >>> known(batch)
        [0.5]
        >>> _ = theta[0].fill_(3)
        >>> known(batch) is None
        True
    """
    cache = batch.cache
    if cache is None or cache.get("versions") != _versions(batch) or cache.get(REPLAYED):
        return None
    if cache["layout"] != layout:
        return None
    largest = cache["largest"]
    return cuda.used_here(largest) if isinstance(largest, Tensor) else largest


@contextmanager
def leaving(batch: Batch, make: Callable[[], T], layout: Any = None) -> Iterator[T | None]:
    """Around a step: where it writes the largest magnitudes, or None if nobody would read them.

    It holds what is known until then, so that a step that a flag on the device stops may leave it
    as it is. The caller counts the step's write with `torch.autograd.graph.increment_version`
    afterwards.

    Args:
        batch: about to be stepped.
        make: makes what says that nothing is known.
        layout: as for `known`.
    """
    cache = batch.cache
    if cache is None or cache.get(REPLAYED) or cuda.is_capturing(batch.params[0].device):
        yield None
        return
    largest = known(batch, layout)
    cache.pop("versions", None)
    if largest is None:
        largest = make()
    yield largest
    versions = [version + 1 for version in _versions(batch)]
    cache.update(versions=versions, largest=largest, layout=layout)


def unknown_largest(batch: Batch, chunk: int) -> Tensor:
    """What says on a GPU that nothing is known of theta and momentum: two numbers for each chunk.

    Args:
        batch: about to be stepped.
        chunk: elements of a tensor whose largest magnitudes are remembered together.

    Returns:
        NaN, in the dtype that the step computes in.

    Example:
        >>> from ca3d_kernels.preparam_step.reference import Hyperparameters
        >>> w = [torch.zeros(3, dtype=torch.float16)]
        >>> unknown_largest(Batch(w, w, w, [], Hyperparameters(lr=0.1), 128.0, 1.0), 4096)
        tensor([nan, nan])
    """
    chunks = sum(-(-w.numel() // chunk) for w in batch.params)
    dtype = torch.promote_types(batch.pre_params[0].dtype, torch.float32)
    return torch.full((2 * chunks,), torch.nan, dtype=dtype, device=batch.params[0].device)


def _versions(batch: Batch) -> list[int]:
    return [x._version for x in (*batch.pre_params, *batch.momenta, *batch.compensations)]
