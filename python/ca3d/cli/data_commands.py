"""What the `ca3d data` commands do."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ca3d.cli.output import Bar, as_json
from ca3d.errors import UserError

if TYPE_CHECKING:
    from ca3d.cli.options import CacheConfig, CheckConfig, ListConfig, MakeConfig, SplitConfig


def make(config: MakeConfig) -> None:
    """Renders one of the package's data sets.

    Args:
        config: The options.
    """
    from ca3d.data import embedded

    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    name, out = options.pop("name"), options.pop("out")
    with Bar("rendering") as bar:
        try:
            folder = embedded.make(name, out, progress=bar.update, **options)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
    print(f"{folder}: {embedded.describe(name)}")


def check(config: CheckConfig) -> int:
    """Looks for what is wrong with a data set.

    Args:
        config: The options.

    Returns:
        0, or 1 when something is wrong.
    """
    from ca3d.data.benchmarks import partition
    from ca3d.data.check import check
    from ca3d.data.sampling import ClipSpec

    if config.workers < 1:
        raise UserError(f"--workers must be at least 1, not {config.workers}")
    official = partition(config.data, config)
    try:
        clip = ClipSpec(frames=config.frames, stride=config.stride, frames_per_second=config.fps)
        with Bar("checking") as bar:
            report = check(
                config.data,
                clip=clip,
                quick=config.quick,
                workers=config.workers,
                decoder=config.decoder,
                progress=bar.update,
                parts=None if official is None else official.splits,
            )
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    if official is not None:
        report.notes[:0] = [official.describe(), *official.notes]
    print(as_json(report.to_dict()) if config.json else report)
    return report.exit_status


def cache(config: CacheConfig) -> None:
    """Decodes and shrinks all videos of a data set once.

    Args:
        config: The options.
    """
    from ca3d.data.cache import build

    with Bar("caching") as bar:
        try:
            report = build(
                config.data,
                config.out,
                config.short_side,
                format=config.format,
                workers=config.workers,
                decoder=config.decoder,
                progress=bar.update,
            )
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
    print(report)


def split(config: SplitConfig) -> None:
    """Writes split files.

    Args:
        config: The options.
    """
    from ca3d.data.benchmarks import partition
    from ca3d.data.splits import split_dataset

    shares = {"train": 1 - config.val - config.test, "val": config.val, "test": config.test}
    if min(shares.values()) < 0 or shares["train"] < 1e-9:
        raise UserError(
            f"--val {config.val} and --test {config.test} must be shares of the videos that leave"
            " some to train on"
        )
    if config.seed < 0:
        raise UserError(f"--seed must not be negative, not {config.seed}")
    official = None
    if config.list_file is None:
        official = partition(config.data, config, val_fraction=config.val, seed=config.seed)
    if official is not None:
        if config.group is not None:
            raise UserError(f"--group {config.group}: {official.protocol} has its own groups")
        print(official.describe())
        for note in official.notes:
            print(f"  {note}")
    report = split_dataset(
        config.data,
        shares,
        config.seed,
        group=config.group,
        out=config.out,
        list_file=config.list_file,
        overwrite=config.force,
        parts=None if official is None else official.splits,
    )
    print(report)


def list_sets(config: ListConfig) -> None:
    """Lists the package's own data sets.

    Args:
        config: No options.
    """
    from ca3d.data import embedded

    for name in embedded.names():
        print(f"{name}: {embedded.describe(name)}")
