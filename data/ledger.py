"""The account of samples that could not be used: counted, named in a file, limited.

One ledger per rank and split, kept by the process that consumes the batches (not by its workers),
so that it holds exactly what training met. The limit counts different samples: a bad one met again
in the next epoch is written again and counted once.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from data.errors import DataError

log = logging.getLogger(__name__)


class Ledger:
    """Appends to `folder`/bad_samples.{split}.rank{rank}.jsonl; no file when folder is None."""

    def __init__(self, folder: Path | None, split: str, rank: int, limit: int) -> None:
        self.path = folder / f"bad_samples.{split}.rank{rank}.jsonl" if folder else None
        self.split = split
        self.limit = limit
        self.samples: set[tuple[str, str]] = set()

    def record(self, entries: list[dict[str, Any]]) -> None:
        """Write down bad samples (dicts with shard, key, reason, ...); DataError past the limit."""
        if not entries:
            return
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
        for entry in entries:
            if not self.samples:
                log.warning(
                    "bad %s sample %s in %s: %s; further ones are %s",
                    self.split,
                    entry["key"],
                    entry["shard"],
                    entry["reason"],
                    f"named in {self.path}" if self.path else "counted in silence",
                )
            self.samples.add((entry["shard"], entry["key"]))
        if len(self.samples) > self.limit:
            last = entries[-1]
            raise DataError(
                f"{len(self.samples)} bad {self.split} samples, more than data.max_bad_samples = "
                f"{self.limit}; the last: {last['key']} in {last['shard']}: {last['reason']}; mend "
                "the shards (`python -m data.check` lists what is wrong) or raise the limit"
            )
