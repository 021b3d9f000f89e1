"""Errors that the command line prints as one line."""


class UserError(Exception):
    """A mistake in what the user asked for or gave: shown as one clear line, without a traceback.

    Example:
        >>> raise UserError("clip.mp4: no such file")
        Traceback (most recent call last):
        ca3d.errors.UserError: clip.mp4: no such file
    """
