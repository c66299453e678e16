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
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.mixture import order_of, resolve_train
from data.order_cli import data_config, parse
from data.reader import ShardReader

MAX_LINES = 20  # findings printed; the count is of all


@dataclass
class Audit:
    """What was found: lines for people, and what is wrong."""

    report: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def taken(folder: Path) -> tuple[dict[int, str], int, list[str]]:
    """Position -> key over all ledgers; how many were taken again; where the keys then differed."""
    found: dict[int, str] = {}
    again, wrong = 0, []
    for line in _lines(folder, "samples"):
        for position, key in zip(line["position"], line["key"], strict=True):
            if position in found:
                again += 1
                if found[position] != key:
                    wrong.append(f"position {position} was {found[position]} once and {key} later")
            found[position] = key
    return found, again, wrong


def _lines(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob(f"{name}*.rank*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(text)
            except ValueError:  # a process that was killed leaves half a line
                continue


def audit(run: Path) -> Audit:
    """Compare the ledgers of a run folder with the order of its config. DataError without any."""
    found, again, wrong = taken(run / "logs")
    if not found:
        raise DataError(f"{run}/logs has no samples.rank*.jsonl; run with data.log_samples = true")
    arguments = parse(["--config", str(run), "--steps", "0:1"])
    config = data_config(arguments)
    train = resolve_train(config)
    order, reader = (
        order_of(train, config, arguments.seed),
        ShardReader(train.shards, config.verify, config.remote),
    )
    substitutes = {
        line["position"]: line.get("replaced_by")
        for line in _lines(run / "logs", "bad_samples.train")
    }
    result = Audit(wrong=wrong)
    positions = np.arange(max(found) + 1)
    place = order.locate(positions)
    result.report.append(
        f"{len(found)} samples taken, positions 0 to {len(positions) - 1}; {again} of them again "
        f"after a restart; {len(substitutes.keys() & found.keys())} substitutes for bad ones"
    )
    seen: dict[tuple[int, int], set[tuple[int, int]]] = {}
    source_of = np.repeat(np.arange(len(train.parts)), [len(part.names) for part in train.parts])
    for position, epoch, shard, sample in zip(positions.tolist(), *place, strict=True):
        if position not in found:
            result.wrong.append(f"position {position} was never taken")
            continue
        planned = reader.key(int(shard), int(sample))
        if found[position] not in (planned, substitutes.get(position)):
            result.wrong.append(
                f"position {position} was {found[position]}, the order says {planned}"
            )
        seen.setdefault((int(source_of[shard]), int(epoch)), set()).add((int(shard), int(sample)))
    result.report += _epochs(seen, [part.num_samples for part in train.parts], place, source_of)
    return result


def _epochs(
    seen: dict[tuple[int, int], set[tuple[int, int]]],
    sizes: list[int],
    place: Any,
    source_of: np.ndarray,
) -> list[str]:
    """A line per epoch of each source: how many different samples, and how often one came."""
    lines = []
    for (source, epoch), samples in sorted(seen.items()):
        turns = int(((source_of[place.shard] == source) & (place.epoch == epoch)).sum())
        name = f"source {source}, epoch {epoch}" if len(sizes) > 1 else f"epoch {epoch}"
        times = "each exactly once" if turns == len(samples) else f"in {turns} turns"
        lines.append(f"{name}: {len(samples)} of {sizes[source]} samples, {times}")
    return lines


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
    for line in found.wrong[:MAX_LINES]:
        print(f"  WRONG  {line}")
    print(f"{len(found.wrong)} findings" if found.wrong else "all is well")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
