"""Pages of fresh memory that a kernel is about to fill."""

from types import ModuleType

from torch import Tensor

# From this size on glibc maps fresh memory for every tensor, and its page faults cost more than the
# kernel: touching 96 MB took 42 ms in pages of 4 KB, and 7.5 ms in huge ones. Smaller tensors get
# memory that was in use before, which has its pages.
_HUGE_PAGES_FROM = 32 << 20


def prepare(native: ModuleType, *results: Tensor) -> None:
    """Asks for huge pages under results that are large and not written yet.

    Args:
        native: the compiled library.
        *results: tensors on the CPU; several may share their memory.
    """
    for address, size in {(x.data_ptr(), x.nbytes()) for x in map(Tensor.untyped_storage, results)}:
        if size >= _HUGE_PAGES_FROM:
            native.advise_huge_pages(address, size)
