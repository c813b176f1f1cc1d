"""The errors that this package raises on purpose.

Every message says what was found, what would have been legal, and what to do next (:func:`wrong` builds that
sentence).  An error that belongs to a place in the user's model carries that place as ``line``.
"""

from __future__ import annotations


def wrong(what: str, found: object, legal: str, step: str = "") -> str:
    """The text of a refusal: ``wrong("n", 0, "an integer >= 1", "pass n=4")``."""
    message = f"{what} is {found}; legal: {legal}"
    return f"{message}. Next: {step}" if step else message


class MHCError(Exception):
    """Base of all errors of this package.

    ``line`` is the source line of the model that the error is about (``"model.py:12, in forward: x = x +
    y"``), or None; it is appended to the message.
    """

    def __init__(self, message: str = "", line: str | None = None) -> None:
        super().__init__(message if line is None else f"{message}\n  at {line}")
        self.line = line


class CaptureError(MHCError):
    """The model could not be captured as one graph."""


class RewriteError(MHCError):
    """The graph could not be rewritten, or a rewritten graph was used in a way that mHC does not support."""


class PartitionError(MHCError):
    """No legal recomputation plan or pipeline cut was found."""


class ExportError(MHCError):
    """The model could not be exported."""


class ConfigError(MHCError, ValueError):
    """An option has a value that is not legal."""


class ShapeError(MHCError, ValueError):
    """A tensor has a shape or dtype that an op of this package does not accept."""
