"""``python -m ca3d_kernels dump-kernels``: kernels as PTX, with all that is needed to launch them.

For each kernel and problem size ``NAME.json`` describes the launch: the name of the entry, its
parameters in order, grid, block and dynamic shared memory, and the files with the code, a ``.ptx``
and a ``.cubin`` (the same, assembled). A Triton kernel has files of its own; the CUDA kernels of an
op share them. Nothing runs, and no GPU is needed.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ca3d_kernels.triton_launch import Launch


class Compiled(NamedTuple):
    """A kernel, compiled for one problem.

    Attributes:
        op, backend, problem: what it is for.
        entry: name of the entry in the PTX.
        ptx, cubin: the code.
        parameters: of the entry, in order: each with name, type and meaning, and with either the
            dtype, shape and strides of the tensor that it points to or its value. That of a CUDA
            kernel is a struct; see `ca3d_kernels.cuda_dump.describe`.
        grid, block: three numbers each.
        shared: bytes of dynamic shared memory.
        module: name of the code, if kernels share it.
    """

    op: str
    backend: str
    problem: dict[str, Any]
    entry: str
    ptx: str
    cubin: bytes
    parameters: list[dict[str, Any]]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    module: str | None = None


# A backend's kernels: a function of the architecture and of the changed problem keys (or None).
Source = Callable[[str, Mapping[str, str] | None], Iterator[Compiled]]

_MEANINGS = {
    "q": "queries",
    "k": "keys",
    "v": "values",
    "o": "output, written",
    "do": "gradient of the output",
    "dq": "gradient of q, written",
    "dk": "gradient of k, written",
    "dv": "gradient of v, written",
    "x": "pixels (B, T, N, C)",
    "dx": "gradient of x, written",
    "dqkv": "gradients of q, k and v of each head, (B, T, N, 3 * C)",
    "weight": "rows of q, k and v of each head",
    "bias": "of q, k and v of each head (of every frame if bias_frame isn't 0); not read if none",
    "bias_head": "stride of bias in its dimension heads, in elements",
    "bias_frame": "stride of bias in its dimension frames, in elements; 0 if all frames are alike",
    "out": "output, written",
    "qkv_weight": "filters of q, k and v of each head, (in, out)",
    "qkv_bias": "of q, k and v of each head, for every frame",
    "norm_scale": "factor of the attention's output and its residual, channel by channel",
    "norm_shift": "added to them, for every frame",
    "column_weight": "filters of each temporal convolution and head, (3 frames * in, out)",
    "column_bias": "of each temporal convolution, added before its ReLU",
    "column_scale": "factor of each channel after each ReLU",
    "column_shift": "added to each channel after each ReLU",
    "convolutions": "number of temporal convolutions",
    "pixels": "B * T * N",
    "partial_weight": "each program's share of the weight's gradient, written; sum over the first",
    "partial_bias": "each program's share of the bias' gradient, written; sum over the first",
    "key_counts": "how often (head, source head, slot) occurs in the key table; not read without",
    "sequences": "outer * inner * heads",
    "heads": "number of heads",
    "inner": "size of the dimension before the heads",
    "positions": "B * N",
    "frames": "number of frames T",
    "blocks": "tiles that a clip is cut into",
    "back": "frames that a window reaches back",
    "stretches": "programs that follow each other along a clip",
    "stretch_tiles": "tiles that each of them goes along",
    "tiles": "number of tiles",
    "kernel_size": "slots of the window",
    "dilation": "frames between neighbouring slots",
    "before": "slots of the window before its query's frame",
    "shift": "1 if windows move inwards at the ends of the clip",
    "zeros": "1 if slots outside the clip take part with logit 0 and value 0",
    "scale": "factor of the logits",
    "chunks": "rows of 8: addresses of the chunk's w, gradient, theta and momentum, how many "
    "elements it has (at most 4096), address of its compensation, where in the tensor it begins, "
    "number of the tensor",
    "hyper": "lr, momentum, 1 - dampening, weight decay, c and k",
    "random": "seed, and how many steps came before",
    "found_inf": "set to 1 by the search; a step with it does nothing unless it is 0",
    "largest": "largest |theta| and |momentum| of each chunk: written by a step, read by the next "
    "search, NaN if unknown",
}
_DIMENSIONS = ("outer", "inner", "head", "frame")


def _meaning(name: str) -> str:
    if name in _MEANINGS:
        return _MEANINGS[name]
    operand, _, dim = name.rpartition("_")
    assert operand in _MEANINGS, name
    assert dim in _DIMENSIONS, name
    return f"stride of {operand} in its dimension {dim}, in elements"


def describe(launch: Launch, types: Mapping[str, str]) -> list[dict[str, Any]]:
    """The parameters of a Triton kernel's entry.

    Args:
        launch: the launch.
        types: Triton's types of all parameters; see `ca3d_kernels.triton_compile.signature`.

    Returns:
        One dictionary for each parameter, in order.
    """
    parameters: list[dict[str, Any]] = []
    for name, kind in types.items():
        if kind == "constexpr":
            continue
        value = launch.arguments[name]
        entry: dict[str, Any] = {"name": name, "type": kind, "meaning": _meaning(name)}
        if isinstance(value, Tensor):
            entry["dtype"] = str(value.dtype).removeprefix("torch.")
            entry["shape"] = list(value.shape)
            entry["strides"] = list(value.stride())
            if launch.contents and name in launch.contents:
                entry["contents"] = launch.contents[name].flatten().tolist()
        else:
            entry["value"] = value
        parameters.append(entry)
    scratch = ("global_scratch", "profile_scratch")
    return parameters + [
        {"name": name, "type": "*i8", "meaning": "not used by this kernel", "value": 0}
        for name in scratch
    ]


def triton_kernels(arch: str, changes: Mapping[str, str] | None) -> Iterator[Compiled]:
    """The Triton kernels of every op; see `Source`."""
    from ca3d_kernels import problems, triton_compile
    from ca3d_kernels.backends import UnsupportedInputError

    for case in problems.cases(changes):
        try:
            launches = problems.launches(case, arch)
        except UnsupportedInputError as limit:
            print(f"{case.op}, {case.name}: not for triton: {limit}")
            continue
        for launch in launches:
            compiled = triton_compile.compile_for(launch, arch)
            assembly = compiled.asm
            constants = {key: str(value) for key, value in launch.constants.items()}
            yield Compiled(
                op=case.op,
                backend="triton",
                problem={"name": case.name, **case.values, "constants": constants},
                entry=compiled.metadata.name,
                ptx=assembly["ptx"],
                cubin=assembly["cubin"],
                parameters=describe(launch, triton_compile.signature(launch)),
                grid=(launch.programs, 1, 1),
                block=(32 * launch.num_warps, 1, 1),
                shared=compiled.metadata.shared,
            )


def cuda_kernels(arch: str, changes: Mapping[str, str] | None) -> Iterator[Compiled]:
    """The CUDA kernels of every op, where they are built; see `Source`."""
    from ca3d_kernels import cuda

    try:
        cuda.library()
    except ImportError as reason:
        print(f"no CUDA kernels: {reason}")
        return
    from ca3d_kernels import cuda_dump

    yield from cuda_dump.kernels(arch, changes)


# What `dump` writes.
SOURCES: list[Source] = [triton_kernels, cuda_kernels]


def dump(arch: str, out: Path, changes: Mapping[str, str] | None = None) -> list[Path]:
    """Writes all kernels for an architecture.

    Args:
        arch: such as ``"sm_90"``.
        out: folder; made if missing.
        changes: see `ca3d_kernels.problems.cases`.

    Returns:
        The JSON files.

    Raises:
        ValueError: arch or a key of the problem is not known.
        ImportError: triton is not installed.
    """
    if not re.fullmatch(r"sm_\d+", arch):
        raise ValueError(f"--arch must be like sm_90, got {arch!r}")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for source in SOURCES:
        for number, kernel in enumerate(source(arch, changes)):
            problem = re.sub(r"[^\w=]+", "-", kernel.problem["name"])
            stem = f"{kernel.backend}-{number:02}-{kernel.entry}-{problem}-{arch}"
            code = stem if kernel.module is None else f"{kernel.backend}-{kernel.module}-{arch}"
            (out / f"{code}.ptx").write_text(kernel.ptx)
            (out / f"{code}.cubin").write_bytes(kernel.cubin)
            about = kernel._asdict()
            del about["ptx"], about["cubin"], about["module"]
            about |= {"arch": arch, "ptx": f"{code}.ptx", "cubin": f"{code}.cubin"}
            file = out / f"{stem}.json"
            file.write_text(json.dumps(about, indent=2) + "\n")
            written.append(file)
    return written
