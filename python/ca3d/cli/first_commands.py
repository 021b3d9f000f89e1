"""What the commands do that a newcomer types first: the demo, and what is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ca3d.cli.output import as_json, log_warnings

if TYPE_CHECKING:
    from ca3d.cli.options import InfoConfig
    from ca3d.demo import DemoConfig


def demo(config: DemoConfig) -> None:
    """Runs the demo.

    Args:
        config: The options.
    """
    from ca3d.demo import run

    log_warnings()
    run(config)


def info(config: InfoConfig) -> None:
    """Describes the installation, a weights file, a run, a data set or a video.

    Args:
        config: The options.
    """
    from ca3d import info as about

    if config.models:
        content = about.models()
    elif config.path is None:
        content = about.installation()
    else:
        content = about.describe(config.path)
    if config.json:
        print(as_json(content))
    else:
        print(about.as_text(content))
