"""`python -m data.audit`: did a run see every sample exactly once, over all its restarts?

    python train.py --config ... --set data.log_samples=true     # with any ranks, stopped, resumed
    python -m data.audit runs/NAME

With `data.log_samples` each rank writes down the samples it was handed, in the run folder's
logs/samples.rank*.jsonl. This command puts the files of all ranks and restarts together and
compares them with the order that seed and position give. Positions have to be there without a gap.
One that was taken twice is what a run did again that had died after its last checkpoint; it must
have had the same sample then. Exit code 0: all is well; 1: something is wrong, and every finding is
a line; 2: there was nothing to look at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from operator import attrgetter
from pathlib import Path

import numpy as np

from data.errors import BadShard, DataError, counted, legible
from data.history import history_of
from data.mixture import TURNS, order_of, resolve_train
from data.order import Place
from data.order_cli import data_config, parse
from data.reader import ShardReader
from data.shards import ShardSet
from data.taken import ledger_lines, taken

MAX_LINES = 20  # findings printed; the count is of all
CHUNK = 1 << 14  # positions looked up at a time


@dataclass
class Audit:
    """What was found: lines for people, the first of what is wrong, and how much that is."""

    report: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    findings: int = 0

    def tell(self, line: str, times: int = 1) -> None:
        """Something is wrong, at so many positions."""
        self.findings += times
        if len(self.wrong) < MAX_LINES:
            self.wrong.append(line)


def audit(run: Path) -> Audit:
    """Compare the ledgers of a run folder with the order of its config. DataError without any."""
    samples = _by_position(run / "logs")
    first = next(samples, None)
    if first is None:
        raise DataError(f"{run}/logs has no samples.rank*.jsonl; run with data.log_samples = true")
    arguments = parse(["--config", str(run), "--steps", "0:1"])
    config = data_config(arguments)
    train = resolve_train(config, labelled=False)  # no label changes the order
    order = order_of(train, config, arguments.seed)
    reader = ShardReader(train.shards, config.verify, config.remote)
    bad = ledger_lines(run / "logs", "bad_samples.train")
    substitutes = {line["position"]: line.get("replaced_by") for line in bad}
    # a source's epochs overlap within a block of turns, see data.mixture
    epochs = _Epochs(train.parts, patience=2 * TURNS * order.streams * config.augment.repeats)
    found = Audit()
    samples = chain([first], samples)
    begin = following = history_of(run, arguments.batch_size).begins_at
    count = again = substituted = 0
    while chunk := list(islice(samples, CHUNK)):
        place = order.locate(np.array([position for position, _ in chunk], dtype=np.int64))
        epochs.add(place, chunk[-1][0])
        for (position, keys), shard, sample in zip(chunk, *place[1:], strict=True):
            if position > following:
                found.tell(_missing(following, position - 1), position - following)
            following = position + 1
            count, again = count + 1, again + len(keys) - 1
            substituted += position in substitutes
            planned = _planned(reader, int(shard), int(sample), position in substitutes)
            for key in sorted(set(keys) - {planned, substitutes.get(position)}):
                said = "a sample of a damaged shard" if planned is None else legible(planned)
                found.tell(f"position {position} was {legible(key)}, the order says {said}")
            if len(set(keys)) > 1:
                both = " and ".join(map(legible, sorted(set(keys))))
                found.tell(f"position {position} was {both} in turn")
    found.report.append(
        f"{count} samples taken, positions {begin} to {following - 1}; {again} of them again after "
        f"a restart; {substituted} substitutes for bad ones"
    )
    found.report += epochs.lines()
    return found


def _planned(reader: ShardReader, shard: int, sample: int, replaced: bool) -> str | None:
    """The key that the order says; None where it was `replaced`, and its shard tells no keys."""
    try:
        return reader.key(shard, sample)
    except BadShard:
        if not replaced:
            raise
        return None


def _by_position(folder: Path) -> Iterator[tuple[int, list[str]]]:
    """Each position that was taken, ascending, with the keys it had: one, or one a time."""
    for position, group in groupby(taken(folder), attrgetter("position")):
        yield position, [key for _, key in group]


def _missing(first: int, last: int) -> str:
    if first == last:
        return f"position {first} was never taken"
    return f"positions {first} to {last} were never taken"


class _Epochs:
    """Counts the samples of each epoch of each source, and forgets them when it is over: when it
    had none for `patience` positions.
    """

    def __init__(self, parts: list[ShardSet], patience: int) -> None:
        self.patience = patience
        self.sizes = [part.num_samples for part in parts]
        shards = [len(part.names) for part in parts]
        self.source_of = np.repeat(np.arange(len(parts)), shards)
        # where each shard begins, in its source
        self.begins = np.concatenate([np.cumsum([0, *part.sizes[:-1]]) for part in parts])
        self.open: dict[tuple[int, int], np.ndarray] = {}  # (source, epoch) -> turns per sample
        self.newest: dict[tuple[int, int], int] = {}  # (source, epoch) -> position
        self.closed: dict[tuple[int, int], str] = {}

    def add(self, place: Place, last: int) -> None:
        """Count these samples; `last` is the position of the last one."""
        source, number = self.source_of[place.shard], self.begins[place.shard] + place.sample
        for name in set(zip(source.tolist(), place.epoch.tolist(), strict=True)):
            rows = (source == name[0]) & (place.epoch == name[1])
            turns = self.open.setdefault(name, np.zeros(self.sizes[name[0]], dtype=np.int32))
            np.add.at(turns, number[rows], 1)
            self.newest[name] = last
        for name in [name for name in self.open if self.newest[name] + self.patience < last]:
            self.closed[name] = self._line(name, self.open.pop(name))

    def lines(self) -> list[str]:
        """A line per epoch of each source: how many different samples, and how often one came."""
        rest = {name: self._line(name, turns) for name, turns in self.open.items()}
        return [line for _, line in sorted((self.closed | rest).items())]

    def _line(self, name: tuple[int, int], turns: np.ndarray) -> str:
        (source, epoch), samples = name, int((turns > 0).sum())
        times = "each exactly once" if turns.sum() == samples else f"in {turns.sum()} turns"
        words = f"source {source}, epoch {epoch}" if len(self.sizes) > 1 else f"epoch {epoch}"
        return f"{words}: {samples} of {self.sizes[source]} samples, {times}"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="the run folder")
    try:
        found = audit(parser.parse_args(arguments).run)
    except DataError as error:
        print(f"data.audit: {error}", file=sys.stderr)
        return 2
    print(*found.report, sep="\n")
    for line in found.wrong:
        print(f"  WRONG  {line}")
    print(counted(found.findings, "finding") if found.wrong else "all is well")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
