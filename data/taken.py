"""Which samples a run was handed, from the ledgers of all its ranks and starts, by position.

A ledger grows by a line per micro-batch, and its positions ascend within one start of the run; a
restart goes back to the last checkpoint. So each file is cut into ascending stretches, and the
stretches of all files are merged. Memory is a block of lines per stretch, however long the run was.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = 1 << 16  # bytes read of a stretch at a time


class Taken(NamedTuple):
    """A sample that was handed over."""

    position: int
    key: str


class _Stretch(NamedTuple):
    """Bytes [begin, end) of a ledger, in which positions ascend."""

    path: Path
    begin: int
    end: int


def taken(folder: Path) -> Iterator[Taken]:
    """All that the ledgers in `folder` name, in the order of positions; again what came again."""
    stretches = [stretch for path in _ledgers(folder, "samples") for stretch in _stretches(path)]
    return heapq.merge(*map(_samples, stretches))


def ledger_lines(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The lines of all ranks' ledgers of that name."""
    for path in _ledgers(folder, name):
        for line, _ in _lines(_Stretch(path, 0, path.stat().st_size)):
            yield line


def _ledgers(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}.rank*.jsonl"))


def _stretches(path: Path) -> Iterator[_Stretch]:
    begin, end, last = 0, 0, -1
    for line, after in _lines(_Stretch(path, 0, path.stat().st_size)):
        if line["position"][0] <= last:
            yield _Stretch(path, begin, end)
            begin = end
        end, last = after, line["position"][-1]
    if end:
        yield _Stretch(path, begin, end)


def _samples(stretch: _Stretch) -> Iterator[Taken]:
    for line, _ in _lines(stretch):
        yield from map(Taken, line["position"], line["key"])


def _lines(stretch: _Stretch) -> Iterator[tuple[dict[str, Any], int]]:
    """Each line, and where the next one begins. The file is open only while a block is read: a
    long run has more stretches than a process may have files.
    """
    at = stretch.begin
    while at < stretch.end:
        with open(stretch.path, "rb") as file:
            file.seek(at)
            block = file.readlines(min(BLOCK, stretch.end - at) - 1)  # until it is exceeded
        for text in block:
            at += len(text)
            try:
                yield json.loads(text), at
            except ValueError:  # a process that was killed leaves half a line
                continue
