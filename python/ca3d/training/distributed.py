"""The processes of a run that `torchrun` started, and what they say to each other.

Every process trains on its share of each batch and holds the same weights. With one process, the
usual case, nothing here communicates and torch.distributed isn't touched.
"""

import contextlib
import ctypes
import io
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ca3d.errors import UserError

T = TypeVar("T")

# The first process may be measuring a data set on a slow disk while the others wait for it.
_TIMEOUT = timedelta(hours=2)
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Args:
        rank: Number of this process, from 0.
        size: Number of processes.
        ordered: Sum gradients in the order of the processes, however they are put together for
            the way; otherwise the sums of three or more processes may differ in the last bit
            between a run and its resumption.

    Example:
        >>> world = World()
        >>> world.is_first, world.share([3, 1, 2]), world.gather("x")
        (True, [3, 1, 2], ['x'])
    """

    rank: int = 0
    size: int = 1
    ordered: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Returns this process's part of a list; the parts are disjoint and complete."""
        return list(items[self.rank :: self.size])

    def gather(self, value: T) -> list[T]:
        """Returns every process's value, in the order of the processes."""
        if self.size == 1:
            return [value]
        # Plain pickling, which torch.distributed would use, can't restore tensors of every dtype.
        content = io.BytesIO()
        torch.save(value, content)
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, content.getvalue())
        return [torch.load(io.BytesIO(each), weights_only=False) for each in values]

    def from_first(self, value: T) -> T:
        """Returns the first process's value."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def rows(self, numbers: Sequence[float]) -> Tensor:
        """Returns every process's numbers, (processes, numbers) in float64."""
        own = torch.tensor(numbers, dtype=torch.float64)
        if self.size == 1:
            return own[None]
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own)
        return torch.stack(rows)

    def first(self, call: Callable[[], T]) -> T | None:
        """Has the first process run something while the others wait.

        Args:
            call: What the first process runs.

        Returns:
            Its result in the first process, None in the others.

        Raises:
            ca3d.errors.UserError: What `call` raised, in the first process; the others leave by
                `SystemExit`, without a message of their own.
        """
        if self.size == 1:
            return call()
        result, error = None, None
        if self.is_first:
            try:
                result = call()
            except UserError as caught:
                error = caught
        fine = self.from_first(error is None)
        if error is not None:
            raise error
        if not fine:
            raise SystemExit(1)
        return result

    def wrap(self, model: nn.Module, forward: Callable[[nn.Module], Tensor]) -> nn.Module:
        """Returns the model as one whose backward pass sums gradients over the processes.

        The sum runs in the gradients' own dtype: float16 gradients travel and are added as
        float16. They are sums, not means: each process weights its loss by its share of the
        global batch before the backward pass, so that every gradient is as large as with one
        process and the sum overflows only if the gradient itself does.

        Args:
            model: The model; its parameters are made those of the first process.
            forward: Runs the model on some clips, for finding parameters that have no gradient and
                that nobody must wait for. It leaves no trace.
        """
        if self.size == 1:
            return model
        wrapped = DistributedDataParallel(
            model,
            forward_sync_buffers=False,
            find_unused_parameters=bool(unused_parameters(model, forward)),
        )
        wrapped.register_comm_hook(self, _sum_in_order if self.ordered else _sum)
        return wrapped

    def accumulating(self, model: nn.Module, more: bool) -> AbstractContextManager[Any]:
        """Returns the context of a forward and backward pass.

        Args:
            model: What `wrap` returned.
            more: Whether gradients stay with this process, since further passes add to them.
        """
        if more and isinstance(model, DistributedDataParallel):
            return model.no_sync()
        return contextlib.nullcontext()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums gradients that `accumulating` kept, where the last pass of a step fell out."""
        if self.size > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)

    @torch.no_grad()
    def same_buffers(self, model: nn.Module) -> None:
        """Gives every process the first one's buffers, such as running statistics."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def any_of(self, flags: Tensor) -> None:
        """Sets in place what is set in any process, in a bool tensor on the CPU."""
        if self.size > 1:
            numbers = flags.to(torch.uint8)
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
            flags.copy_(numbers.bool())


def _end_with_torchrun() -> None:
    """Has Linux end this process when torchrun is killed, which can't end its workers then.

    They would wait for one another up to the timeout, and keep the run folder from being resumed.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None and "TORCHELASTIC_RUN_ID" in os.environ:
        prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))


@contextlib.contextmanager
def connect(device: torch.device, ordered: bool = False) -> Iterator[World]:
    """Joins the processes that torchrun started; a process of its own is a world of one.

    Args:
        device: Where this process computes.
        ordered: As in `World`.

    Yields:
        The world, until the processes part.

    Raises:
        ca3d.errors.UserError: The launcher's environment variables are incomplete.

    Example:
        >>> with connect(torch.device("cpu")) as world:
        ...     world.size
        1
    """
    size = processes()
    if size == 1:
        yield World()
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {size} but {', '.join(missing)} is not set: start the processes with"
            " torchrun"
        )
    _end_with_torchrun()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    dist.init_process_group(
        backend, store=_of_this_life(store), rank=rank, world_size=size, timeout=_TIMEOUT
    )
    try:
        yield World(rank, size, ordered)
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        raise UserError(
            f"process {rank}: another process of the run has ended; torchrun --max-restarts starts"
            " all of them again, and --resume auto goes on from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


def _of_this_life(store: dist.Store) -> dist.Store:
    """Keeps processes that torchrun started again from the addresses that the dead have left.

    The agent's store outlives them (pytorch/pytorch#135712). Several agents count restarts each
    for itself; there the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and os.environ.get("GROUP_WORLD_SIZE") == "1":
        return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    return store


def processes() -> int:
    """Returns the number of processes that the launcher started.

    Example:
        >>> processes()
        1
    """
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the first of those that the launcher started.

    Example:
        >>> is_first()
        True
    """
    return processes() == 1 or os.environ.get("RANK", "0") == "0"


def unused_parameters(model: nn.Module, forward: Callable[[nn.Module], Tensor]) -> list[str]:
    """Names the parameters to train that a model's output doesn't depend on.

    Args:
        model: The model, in training mode; buffers and random state are left as they were.
        forward: Runs it.

    Example:
        >>> layers = nn.ModuleDict({"used": nn.Linear(2, 2, bias=False), "dead": nn.Linear(2, 2)})
        >>> unused_parameters(layers, lambda model: model["used"](torch.ones(1, 2)))
        ['dead.weight', 'dead.bias']
    """
    buffers = [buffer.detach().clone() for buffer in model.buffers()]
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    with torch.random.fork_rng(devices):
        output = forward(model)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    seen: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    reached = {id(node.variable) for node in seen if hasattr(node, "variable")}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in reached
    ]


def _sum(world: World, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _sum_in_order(world: World, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    own = bucket.buffer()
    parts = [torch.empty_like(own) for _ in range(world.size)]
    work = dist.all_gather(parts, own, async_op=True)

    def add(future: torch.futures.Future[Any]) -> Tensor:
        future.wait()
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    return work.get_future().then(add)
