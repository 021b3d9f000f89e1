"""The class of what is no activity: learnt like any other class, and never an event."""

from collections.abc import Sequence

BACKGROUND = "background"


def background_index(classes: Sequence[str]) -> int | None:
    """Returns the place of the class that is no event, or None.

    Args:
        classes: Class names; the one called `background`, in any case, is meant.

    Example:
        >>> background_index(["Background", "fall"])
        0
    """
    names = [name.strip().casefold() for name in classes]
    return names.index(BACKGROUND) if BACKGROUND in names else None
