"""The ways in which data can fail: a whole run, one shard, or one sample.

What a run ends with is exit code 2, which schedulers take for final, unless the error says another
(`exit_code`): with 1 they may start it again, for what may have passed by then.
"""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # part of Persian words and of emoji, and unseen by isprintable


class DataError(ValueError):
    """What the user has to mend before training can go on: one line, with the mend."""


class BadShard(DataError):
    """A shard that is damaged or missing, for whoever reads it; may be quarantined."""


class Unreachable(DataError):
    """A shard that this process cannot get at: the network, a disk or rights fail.

    Always stops the run. Another rank may well read it, so a quarantine would leave ranks with
    other samples than their share of the order, and a resume with others again.
    """

    exit_code = 1


class Refused(Unreachable):
    """As Unreachable, but final: no wait mends rights, credentials or the URL."""

    exit_code = 2


class LoaderFailed(DataError):
    """A loader process died or hangs: its memory, disk or machine may be well at the next start."""

    exit_code = 1


class BadSample(Exception):
    """One sample that cannot be used; it is ledgered and replaced, and counts towards a limit."""


class Quarantined(BadSample):
    """A sample that cannot be used because its whole shard cannot: that counts, not the sample."""


def legible(name: str) -> str:
    """A sample's name as messages show it: what nobody sees, or what turns the line, is escaped."""
    return "".join(c if _shows(c) else c.encode("unicode_escape").decode() for c in name)


def counted(number: int, thing: str) -> str:
    """'1 shard', '2,000 shards'."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _shows(character: str) -> bool:
    return (
        character.isprintable()
        or unicodedata.category(character) == "Zs"  # macOS writes U+202F into screenshots' names
        or character in _JOINERS
    )
