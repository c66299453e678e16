"""The two ways in which data can fail: a whole run (DataError) or one sample (BadSample)."""

from __future__ import annotations


class DataError(ValueError):
    """What the user has to mend before training can go on: one line, with the mend."""


class BadSample(Exception):
    """One sample that cannot be used; it is ledgered and replaced, and counts towards a limit."""
