"""The ways in which data can fail: a whole run, one shard, or one sample."""

from __future__ import annotations


class DataError(ValueError):
    """What the user has to mend before training can go on: one line, with the mend."""


class BadShard(DataError):
    """A shard that is damaged or missing, for whoever reads it; may be quarantined."""


class Unreachable(DataError):
    """A shard that this process cannot get at: the network, a disk or rights fail.

    Always stops the run. Another rank may well read it, so a quarantine would leave ranks with
    other samples than their share of the order, and a resume with others again.
    """


class BadSample(Exception):
    """One sample that cannot be used; it is ledgered and replaced, and counts towards a limit."""


class Quarantined(BadSample):
    """A sample that cannot be used because its whole shard cannot: that counts, not the sample."""
