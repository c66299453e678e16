"""The samples that `data.write` could not use: counted against a limit, listed, and told.

A set that lost a tenth of its images trains as if nothing had happened, so the list lies beside the
shards (skipped.jsonl), its length and first reason are printed whenever the set is named, and past
`--max-skipped` nothing is vouched for.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from data.errors import DataError, legible
from data.manifest import write_atomically

LIST_NAME = "skipped.jsonl"
DEFAULT_SHARE = 0.01


class Skipped:
    """What was skipped of the split with `samples` samples that is written into `folder`."""

    def __init__(self, folder: Path, samples: int, share: float) -> None:
        self.path = folder / LIST_NAME
        self.samples = samples
        self.share = share
        self.lines: list[dict[str, Any]] = []
        self.path.unlink(missing_ok=True)  # that of an earlier run

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Take what was skipped of one more shard. DataError past the limit."""
        self.lines += lines
        allowed = math.floor(self.samples * self.share + 1e-9)  # 0.29 * 100 is 28.999...
        if len(self.lines) > allowed:
            self.save()
            raise DataError(
                f"{told(self.lines, self.path.parent)}; that is more than the {allowed} of "
                f"{self.samples} that --max-skipped {self.share:g} allows: mend them, or start "
                "again with a higher one (finished shards are kept)"
            )

    def save(self) -> None:
        """Write the list, if there is anything to list."""
        if self.lines:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_atomically(self.path, text.encode())


def skipped_in(folder: Path) -> str:
    """In words what was skipped when `folder` was written; empty for nothing."""
    path = folder / LIST_NAME
    if not path.exists():
        return ""
    return told([json.loads(line) for line in path.read_text().splitlines()], folder)


def told(lines: list[dict[str, Any]], folder: Path) -> str:
    """In words what was skipped, with the place of the list where there is one."""
    key, reason = legible(lines[0]["key"]), lines[0]["reason"]
    everything = f" (all in {folder / LIST_NAME})" if (folder / LIST_NAME).exists() else ""
    return f"{len(lines)} skipped, the first {key}: {reason}{everything}"
