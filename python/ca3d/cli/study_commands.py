"""What the commands that measure and compare do."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ca3d.cli.output import log_warnings

if TYPE_CHECKING:
    from ca3d.edge_bench import BenchConfig
    from ca3d.experiments.claims_study import ClaimsConfig
    from ca3d.experiments.compare import CompareConfig
    from ca3d.experiments.precision_study import PrecisionStudyConfig
    from ca3d.experiments.results_study import ResultsStudyConfig
    from ca3d.footprint import FootprintConfig


def footprint(config: FootprintConfig) -> None:
    """Measures models, and prints a table.

    Args:
        config: The options.
    """
    from ca3d.footprint import footprint as run
    from ca3d.report.footprint_table import as_text

    rows = run(config, lambda line: print(line, file=sys.stderr))
    print(as_text(rows))


def bench(config: BenchConfig) -> None:
    """Measures latency and memory, and prints a table.

    Args:
        config: The options.
    """
    from ca3d.edge_bench import as_text
    from ca3d.edge_bench import bench as run

    rows = run(config, lambda line: print(line, file=sys.stderr))
    print(as_text(rows))


def compare(config: CompareConfig) -> None:
    """Compares models, and says where the report is.

    Args:
        config: The options.
    """
    from ca3d.experiments.compare import run

    log_warnings()
    print(f"report: {run(config)}")


def study_precision(config: PrecisionStudyConfig) -> None:
    """Runs the precision study, and says where its report is.

    Args:
        config: The options.
    """
    from ca3d.experiments.precision_study import run

    print(f"report: {run(config)}")


def study_results(config: ResultsStudyConfig) -> None:
    """Compares small models, and says where the report is.

    Args:
        config: The options.
    """
    from ca3d.experiments.results_study import run

    print(f"report: {run(config)}")


def study_claims(config: ClaimsConfig) -> None:
    """Runs the ablations, and says where their report is.

    Args:
        config: The options.
    """
    from ca3d.experiments.claims_study import run

    print(f"report: {run(config)}")
