"""Prints every ratio that the benchmarks noted in `extra_info`, and saves them as JSON."""

import json
import platform
from pathlib import Path

import interleaved
import pytest
import torch

from ca3d_kernels import backends


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ratios-json",
        default=str(Path(__file__).parent / "results.json"),
        help="where the ratios of the benchmarks go (default: results.json beside them)",
    )
    parser.addoption(
        "--quick",
        action="store_true",
        help="one round of each comparison: to see that all run, not how fast",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick"):
        interleaved.most_rounds = 1


def _machine() -> dict[str, object]:
    native = backends.native()
    return {
        "processor": platform.processor() or platform.machine(),
        "instruction_set": native.isa() if native else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    session = getattr(config, "_benchmarksession", None)
    done = [bench for bench in session.benchmarks if bench.extra_info] if session else []
    if not done:
        return
    terminalreporter.section("ratios of medians, interleaved")
    width = max(len(bench.name) for bench in done)
    for bench in done:
        for what, ratio in bench.extra_info.items():
            terminalreporter.write_line(f"{bench.name:{width}s}  {what:34s} {ratio:9.3f}")
    path = Path(config.getoption("--ratios-json"))
    results = {
        "machine": _machine(),
        "benchmarks": {
            bench.name: {"median_seconds": bench.stats.median, **bench.extra_info} for bench in done
        },
    }
    path.write_text(json.dumps(results, indent=2) + "\n")
    terminalreporter.write_line(f"saved to {path}")
