"""PutStatus: what a put into a bounded cache came to."""

import enum


class PutStatus(enum.Enum):
    """Answer of a put. Source: LMCache's evictors, names and values kept."""

    LEGAL = 1
    """The value is in."""
    ILLEGAL = 2
    """The value was refused: it does not fit, and nothing changed."""
