"""The account of samples that could not be used: counted, named in a file, limited.

One ledger per rank and split, kept by the process that consumes the batches (not by its workers),
so that it holds exactly what training met. The limit counts different samples: a bad one met again
in the next epoch is written again and counted once. Samples of a quarantined shard are written one
by one as well, but what counts there is the shard. A disk that takes no more costs lines of the
files, never the run.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from data.errors import DataError, legible

log = logging.getLogger(__name__)


class Ledger:
    """Appends to `folder`/bad_samples.{split}.rank{rank}.jsonl; no file when folder is None.

    `log_samples` asks for the good ones too, in samples.rank{rank}.jsonl: what data.audit reads.
    """

    def __init__(
        self,
        folder: Path | None,
        split: str,
        rank: int,
        limit: int,
        shard_limit: int = 0,
        log_samples: bool = False,
    ) -> None:
        self.samples_path = folder / f"samples.rank{rank}.jsonl" if folder and log_samples else None
        self.path = folder / f"bad_samples.{split}.rank{rank}.jsonl" if folder else None
        self.split = split
        self.limit = limit
        self.shard_limit = shard_limit
        self.samples: set[tuple[str, str]] = set()
        self.shards: set[str] = set()
        self._lacking: set[Path] = set()  # files that the disk has refused lines of

    def record(self, entries: list[dict[str, Any]]) -> None:
        """Write down bad samples (dicts with shard, key, reason, ...); DataError past the limit."""
        if not entries:
            return
        if self.path is not None:
            self._write(self.path, entries)
        for entry in entries:
            if entry.get("quarantined"):
                self._quarantine(entry)
            else:
                self._count(entry)

    def took(self, batch: dict[str, Any]) -> None:
        """Write down the samples of a micro-batch that is handed over, if that was asked for."""
        if self.samples_path is None:
            return
        line = {"position": batch["position"].tolist(), "key": batch["key"]}
        self._write(self.samples_path, [line])

    def _write(self, path: Path, lines: list[dict[str, Any]]) -> None:
        try:
            _append(path, lines)
        except OSError as error:
            if path not in self._lacking:
                log.warning("%s lacks lines from here on: %s", path, error)
            self._lacking.add(path)

    def _count(self, entry: dict[str, Any]) -> None:
        if not self.samples:
            log.warning(
                "bad %s sample %s in %s: %s; further ones are %s",
                self.split,
                legible(entry["key"]),
                entry["shard"],
                entry["reason"],
                f"named in {self.path}" if self.path else "counted in silence",
            )
        self.samples.add((entry["shard"], entry["key"]))
        if len(self.samples) > self.limit:
            raise DataError(
                f"{len(self.samples)} bad {self.split} samples, more than data.max_bad_samples = "
                f"{self.limit}; the last: {legible(entry['key'])} in {entry['shard']}: "
                f"{entry['reason']}; mend the shards (`python -m data.check` lists what is wrong) "
                "or raise the limit"
            )

    def _quarantine(self, entry: dict[str, Any]) -> None:
        if entry["shard"] in self.shards:
            return
        self.shards.add(entry["shard"])
        log.warning("%s shard quarantined: %s", self.split, entry["reason"])
        if len(self.shards) > self.shard_limit:
            raise DataError(
                f"{len(self.shards)} damaged {self.split} shards, more than data.max_bad_shards = "
                f"{self.shard_limit}; the last: {entry['reason']}"
            )


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines to a file whose last one a killed process may have left half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
