"""The folder in which the checkpoints of a run stand: how they are called, which stay, which go.

Nothing here is collective: every rank may look, rank 0 alone changes.

What goes is hidden by a rename, at once; its files are deleted by a thread, since gigabytes take a
second and all ranks would wait for rank 0. Where a start dies meanwhile, the next one clears them
away (publishing.py).
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from routedvit.training.background import Background
from routedvit.training.checkpoints.manifest import numbered, replace_text, step_name, sync
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.run_state import read_run_state

LATEST = "latest"
STEP = re.compile(r"step_\d{8,}")  # `step_name`


def names_in(folder: Path) -> list[str]:
    """The complete checkpoints in `folder`, oldest first; they may be damaged.

    A copy that somebody made beside them under a name of its own is none.

    Raises:
        OSError: it is there and cannot be listed. (`Path.glob` would find nothing instead, and the
            run would begin anew.)
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if STEP.fullmatch(e.name) and e.is_dir())
    except FileNotFoundError:
        return []


class Shelf:
    """The checkpoints in one folder.

    Args:
        folder: need not exist.
        retention: which ones to keep.
        tell: called with one line about what did not succeed and harms nothing.
    """

    def __init__(self, folder: Path, retention: Retention, tell: Callable[[str], None]) -> None:
        self.folder = folder
        self.retention = retention
        self.tell = tell
        self._deletion: Background[list[str]] | None = None

    def path_of(self, step: int) -> Path:
        """Folder of the checkpoint of `step`, whether it exists or not."""
        return self.folder / step_name(step)

    def names(self) -> list[str]:
        """See `names_in`."""
        return names_in(self.folder)

    def values(self) -> dict[int, float | None]:
        """The kept metric of every checkpoint by its step, None where there is none to read."""
        values: dict[int, float | None] = {}
        for name in self.names():
            value = None
            if self.retention.keep_best:
                # A damaged one has no value; a load will name it.
                with contextlib.suppress(OSError, ValueError, TypeError):
                    state = read_run_state(self.folder / name)
                    value = state.metrics.get(self.retention.metric)
            values[int(name.removeprefix("step_"))] = value
        return values

    def welcome(self, name: str, bad_since: int | None) -> None:
        """`latest` and retention after a save; the new one is there whatever fails."""
        try:
            sync(self.folder)
            self.point_to(name)
        except OSError as error:
            self.tell(f"{name} was saved, but {LATEST} does not name it yet: {error}")
            return  # what `latest` still names must not go
        self.delete_surplus(bad_since)

    def point_to(self, name: str) -> None:
        """Make `latest` name this checkpoint; nothing is written if it does."""
        latest, text = self.folder / LATEST, f"{name}\n".encode()
        if not (latest.is_file() and latest.read_bytes() == text):
            replace_text(latest, text.decode())

    def delete_surplus(self, bad_since: int | None) -> None:
        """Delete what retention does not keep; see there for `bad_since`, its `before`."""
        try:
            surplus = self.retention.surplus(self.values(), before=bad_since)
        except OSError as error:
            self.tell(f"checkpoints that may go cannot be found: {error}")
            return
        self.delete([step_name(step) for step in surplus])

    def delete(self, names: Sequence[str]) -> None:
        """Delete checkpoints: none of them is one from now on, their files go in a thread."""
        if names:
            self.finish_deletion()
        doomed: list[Path] = []
        for name in names:
            hidden = self.folder / f".{name}.tmp"
            try:
                doomed.append((self.folder / name).rename(hidden))
            except OSError as error:
                self.tell(f"checkpoint {name} could not be deleted: {error}")
        if doomed:
            self._deletion = Background(lambda: _delete(doomed), name="delete checkpoints")

    def finish_deletion(self) -> None:
        """Wait until all files are gone; what cannot be deleted (NFS keeps open ones) is told."""
        deletion, self._deletion = self._deletion, None
        for line in deletion.result() if deletion else []:
            self.tell(line)

    def set_aside(self, name: str, why: str) -> Path:
        """Rename a checkpoint to WHY_NAME, so that the run can reach its step again."""
        names = numbered(self.folder / f"{why}_{name}")
        return (self.folder / name).rename(next(path for path in names if not path.exists()))


def _delete(paths: Sequence[Path]) -> list[str]:
    """Delete folders; a line about each that did not go."""
    lines = []
    for path in paths:
        try:
            shutil.rmtree(path)
        except OSError as error:
            lines.append(f"checkpoint {path.name[1:-4]} could not be deleted: {error}")
    return lines
