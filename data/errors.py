"""The ways in which data can fail: a whole run, one shard, or one sample."""

from __future__ import annotations


class DataError(ValueError):
    """What the user has to mend before training can go on: one line, with the mend."""


class BadShard(DataError):
    """A shard that is damaged, missing or not to be had; stops the run unless max_bad_shards."""


class BadSample(Exception):
    """One sample that cannot be used; it is ledgered and replaced, and counts towards a limit."""


class Quarantined(BadSample):
    """A sample that cannot be used because its whole shard cannot: that counts, not the sample."""
