"""``python -m ca3d_kernels``: what is installed, and which backend each op would use and why.

``python -m ca3d_kernels dump-kernels`` writes the GPU kernels; see `ca3d_kernels.dump`.
"""

import argparse
import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

import ca3d_kernels
from ca3d_kernels import backends

_OPENMP = re.compile(r"/lib(gomp|omp|iomp5)[^/]*\.so")


def openmp_runtimes(maps: Iterable[str] | None = None) -> list[str]:
    """Files of the OpenMP runtimes that are loaded into this process.

    Args:
        maps: lines of ``/proc/self/maps``; None reads them.

    Returns:
        Sorted paths; empty where the system has no such file.

    Example:
        >>> openmp_runtimes(["7f00-7f01 r-xp 0 08:01 42   /usr/lib/libgomp.so.1"])
        ['/usr/lib/libgomp.so.1']
    """
    if maps is None:
        file = Path("/proc/self/maps")
        maps = file.read_text().splitlines() if file.exists() else ()
    return sorted({line.split(maxsplit=5)[5] for line in maps if _OPENMP.search(line)})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> list[str]:
    return [
        f"ca3d_kernels  {_version('ca3d-kernels')}  ({Path(ca3d_kernels.__file__).parent})",
        f"torch         {torch.__version__}",
        f"triton        {_version('triton')}",
        f"python        {platform.python_version()}, {platform.platform()}",
    ]


def _native() -> list[str]:
    try:
        module = backends.native()
    except ImportError as error:
        return [f"compiled library  {error}"]
    if module is None:
        return [f"compiled library  missing: {backends.native_error()}"]
    lines = [
        f"compiled library  {module.__file__}",
        f"version           {module.version()}",
        f"instruction set   {module.isa()}  (usable: {', '.join(module.isas())})",
        f"threads           {torch.get_num_threads()}",
    ]
    runtimes = openmp_runtimes()
    lines += [f"OpenMP runtime    {path}" for path in runtimes]
    if len(runtimes) > 1:
        lines.append(
            "warning: several OpenMP runtimes are loaded; they compete for the cores. "
            "Import torch before other libraries that use OpenMP."
        )
    return lines


def _gpus() -> list[str]:
    driver = Path("/proc/driver/nvidia/version")
    lines = [driver.read_text().splitlines()[0]] if driver.exists() else []
    if not torch.cuda.is_available():
        return [*lines, "no GPU that torch can use"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append(f"cuda:{index}  {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    return lines


def _choices() -> list[str]:
    lines = []
    for op in backends.ops():
        for device in ("cpu", "cuda"):
            try:
                chosen = backends.choose(op, device)[0].backend
            except (ValueError, ImportError) as error:
                lines.append(f"{op} on {device}: none, {error}")
                continue
            lines.append(f"{op} on {device}: {chosen}")
            lines += [
                f"    {backend}: {'can run' if obstacle is None else obstacle}"
                for backend, obstacle in backends.explain(op, device).items()
                if backend != chosen
            ]
    return lines


def report() -> str:
    """What is installed and loaded, and which backend each op would use, as text.

    Returns:
        Several paragraphs, each with a heading.

    Example:
        >>> "local_attention on cpu" in report()
        True
    """
    paragraphs = {
        "Versions": _versions(),
        "CPU": _native(),
        "GPU": _gpus(),
        "Backend of each op": _choices(),
    }
    return "\n\n".join(
        "\n".join((title, *("  " + line for line in lines))) for title, lines in paragraphs.items()
    )


def main(arguments: list[str]) -> int:
    """Prints the report, or runs a command; returns the exit code.

    Example:
        >>> main(["unknown"])
        2
    """
    parser = argparse.ArgumentParser(
        prog="python -m ca3d_kernels",
        description="Without a command: what is installed, and which backend each op would use.",
    )
    commands = parser.add_subparsers(dest="command")
    dumping = commands.add_parser(
        "dump-kernels", help="write every GPU kernel as PTX, with a description of its launch"
    )
    dumping.add_argument("--arch", required=True, help="GPU architecture, such as sm_90")
    dumping.add_argument("--out", required=True, type=Path, help="folder to write to")
    dumping.add_argument(
        "--problem",
        metavar="KEY=VALUE,...",
        help="one problem instead of the ordinary ones, such as frames=16,dtype=bfloat16",
    )
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    if options.command is None:
        try:
            print(report(), flush=True)
        except BrokenPipeError:
            # The reader of a pipe (`| head`) has gone; Python would complain once more at exit.
            sys.stdout = None
        return 0
    return _dump_kernels(options.arch, options.out, options.problem)


def _dump_kernels(arch: str, out: Path, problem: str | None) -> int:
    from ca3d_kernels.dump import dump

    try:
        changes = None
        if problem is not None:
            pairs = [pair.split("=") for pair in problem.split(",")]
            if any(len(pair) != 2 for pair in pairs):
                raise ValueError(f"--problem must be KEY=VALUE,..., got {problem!r}")
            changes = dict(pairs)
        files = dump(arch, out, changes)
    except (ValueError, ImportError) as error:
        print(f"dump-kernels: {error}", file=sys.stderr)
        return 2
    print(f"{len(files)} kernels written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
