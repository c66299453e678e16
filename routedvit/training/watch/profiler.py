"""A window of steps under torch's profiler: `--set log.profile_steps=[50,55]`.

Rank 0 only, since all ranks do the same. Writes a trace for https://ui.perfetto.dev or
chrome://tracing and a table of the most expensive operators. Steps inside the window are slower. A
run does not end for a profile: what the disk refuses is told.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROWS = 40


class ProfilerWindow:
    """Profiles the steps `first` to `last`.

    Args:
        folder: where the trace goes; made if it does not exist.
        tell: told in one line where the trace is.
    """

    def __init__(self, first: int, last: int, folder: Path, tell: Callable[[str], None]) -> None:
        self.first, self.last = first, last
        self.folder = folder
        self.tell = tell
        self._profile: Any = None
        self._closed = False  # once: a run that went back comes by again

    def advance(self, step: int) -> None:
        """`step` begins now: start, or stop and write."""
        if not self.first <= step <= self.last:
            self.close()
        elif self._profile is None and not self._closed:
            self._profile = torch.profiler.profile()
            self._profile.start()

    def close(self) -> None:
        """Write what was profiled, if anything."""
        if self._profile is None:
            return
        self._profile.stop()
        profile, self._profile, self._closed = self._profile, None, True
        trace = self.folder / f"steps_{self.first}_to_{self.last}.json"
        try:
            self._write(profile, trace)
        except OSError as error:
            self.tell(
                f"no profile in {trace} ({error}); see to the room on its disk and to its rights; "
                "the run goes on"
            )
        else:
            self.tell(f"profile in {trace} (open it in https://ui.perfetto.dev)")

    def _write(self, profile: Any, trace: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        table = profile.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
        trace.with_suffix(".txt").write_text(table, encoding="utf-8")
        trace.unlink(missing_ok=True)  # one of an earlier start would stand for it
        profile.export_chrome_trace(str(trace))
        trace.stat()  # torch 2.15 raises nothing when it cannot write
