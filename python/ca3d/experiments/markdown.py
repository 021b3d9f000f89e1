"""Tables and figures of the reports, as Markdown."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["machine", "p_text", "percent", "table"]


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Returns the lines of a table.

    Args:
        columns: Headings; all columns but the first are aligned to the right.
        rows: Cells in the order of the headings.

    Example:
        >>> print("\\n".join(table(["model", "%"], [["a", 50]])))
        | model | % |
        |---|---:|
        | a | 50 |
    """
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append("|---|" + "---:|" * (len(columns) - 1))
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return lines


def percent(value: float | None, digits: int = 1) -> str:
    """Returns a share in percent, or a dash for none.

    Example:
        >>> percent(0.123), percent(None)
        ('12.3', '-')
    """
    return "-" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def p_text(p: float | None) -> str:
    """Returns a p-value as it is printed; of none, and where nothing is inferred, a dash.

    Example:
        >>> p_text(0.034), p_text(1e-5), p_text(float("nan"))
        ('0.034', '< 0.001', '-')
    """
    if p is None or math.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def machine() -> str:
    """Returns a sentence about the machine that computes here.

    Example:
        >>> machine().endswith(".")
        True
    """
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {where}; torch {torch.__version__}."
