"""A copy of the run folder in a bucket, kept up to date beside the training.

    URL/NAME/checkpoints/step_00000100/...    as in the run folder; its manifest.json comes last
             config.json, events.*, logs/ ...  every file that has changed
             owner.json                        which start copies; an older one leaves it alone

Rank 0 copies in a thread: after each checkpoint, evaluation and return, and once more at the end,
for which all wait. A checkpoint without a manifest is none, so whatever a copy is cut off by, what
was there before is whole. What cannot be copied is told and costs the run nothing: it is tried
again, and anew at the next checkpoint.

Which checkpoints stay there follows from the rule that holds here (retention.py), applied to those
that are there: the folder of a new machine has one of them, and the others must not go for that.
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from routedvit.training.background import Background
from routedvit.training.checkpoints.bucket import Bucket
from routedvit.training.checkpoints.manifest import EVALUATION, MANIFEST, step_name
from routedvit.training.checkpoints.ownership import OWNER
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.shelf import LATEST, STEP, names_in
from routedvit.training.config.base import one_line

CHECKPOINTS = "checkpoints"
PART = re.compile(rf"{CHECKPOINTS}/({STEP.pattern})/(.+)")  # a file of a checkpoint in the copy
PAUSES = (2.0, 8.0, 30.0)  # seconds before a copy that failed is tried again


class Mirror:
    """Copies a run folder. One of rank 0; no method waits but `wait`.

    Args:
        folder: of the run.
        bucket: where to.
        retention: which checkpoints are to stay there.
        owner: id of this start.
        pauses: seconds before another try.

    `tell` is called, by the thread, with one line about what could not be copied.
    """

    def __init__(
        self,
        folder: Path,
        bucket: Bucket,
        *,
        retention: Retention,
        owner: str,
        pauses: tuple[float, ...] = PAUSES,
    ) -> None:
        self._folder = folder
        self._bucket = bucket
        self.place = bucket.shown
        self._retention = retention
        self._owner = owner
        self.tell: Callable[[str], None] = print
        self._pauses = pauses
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of files as they were copied
        self._whole: dict[str, bytes] = {}  # manifests of checkpoints that are there
        self._lock = threading.Lock()
        self._wanted = self._running = self._is_over = False
        self._trouble = ""  # that lasts
        self._thread: Background[None] | None = None

    def begin(self) -> None:
        """From now on the copy is this start's.

        Raises:
            OSError: nothing can be written there.
        """
        self._bucket.write(OWNER, json.dumps({"id": self._owner}).encode())

    def follow(self, *, last: bool = False) -> None:
        """Something has changed in the run folder; `last`: and nothing will any more."""
        if last:
            self._pauses = self._pauses[:1]  # a scheduler may be waiting
        with self._lock:
            self._wanted = not self._is_over
            if self._wanted and not self._running:
                self._running = True
                self._thread = Background(self._run, name="mirror")

    def wait(self, seconds: float) -> bool:
        """Wait until all is copied or given up, but no longer; whether it still goes on."""
        if self._thread is not None:
            self._thread.wait(seconds)
        return self._running

    def _run(self) -> None:
        """Copy, until nothing has changed meanwhile."""
        while True:
            with self._lock:
                if not self._wanted:
                    self._running = False
                    return
                self._wanted = False
            self._try()

    def _try(self) -> None:
        """Copy, and again after each pause if it fails; a trouble that lasts is told once."""
        for pause in (*self._pauses, None):
            try:
                self._copy()
            except Exception as error:  # whatever it is, the run goes on
                trouble = one_line(error)
            else:
                if self._trouble:
                    self.tell("the copy of the run is like the run folder again")
                self._trouble = ""
                return
            if pause is not None:
                time.sleep(pause)
        if trouble != self._trouble:
            self.tell(
                f"the copy of the run is behind: {trouble}; the next save or start tries again"
            )
        self._trouble = trouble

    def _copy(self) -> None:
        """Make the copy like the run folder; what is in it stays whole at every moment."""
        there = self._bucket.names()
        owner = json.loads(self._bucket.read(OWNER) or b"{}").get("id")
        if owner not in (None, self._owner):
            with self._lock:
                self._is_over, self._wanted = True, False
            self.tell(f"a newer start copies to {self.place}; this one no longer does")
            return
        files = list(changing_files(self._folder))
        for path in files:  # how to go on from a checkpoint, by the jumps over bad data, goes first
            if path.parent == self._folder / CHECKPOINTS:
                self._send(path)
        names = names_in(self._folder / CHECKPOINTS)
        for name in reversed(names):
            if self._send_checkpoint(name, there):
                there.add(f"{CHECKPOINTS}/{name}/{MANIFEST}")
        for path in files:
            self._send(path)
        if names and names[-1] in complete(there):
            for name in self._surplus(names, there):
                self._remove(name)

    def _send(self, path: Path) -> None:
        """Copy a file, unless it is as it was when it was copied or is gone."""
        name = path.relative_to(self._folder).as_posix()
        try:
            found = path.stat()
            state = found.st_size, found.st_mtime_ns
            if self._sent.get(name) != state:
                self._bucket.put(path, name)
                self._sent[name] = state
        except FileNotFoundError:
            return

    def _send_checkpoint(self, name: str, there: set[str]) -> bool:
        """Copy a checkpoint, unless it is there; whether it was copied."""
        folder, place = self._folder / CHECKPOINTS / name, f"{CHECKPOINTS}/{name}"
        try:
            manifest = (folder / MANIFEST).read_bytes()
            if f"{place}/{MANIFEST}" in there and self._manifest(name) == manifest:
                return False
            self._remove(name)  # half of it, or another of that name: the run has gone back since
            for file in json.loads(manifest)["files"]:
                self._bucket.put(folder / file, f"{place}/{file}")
        except FileNotFoundError:
            return False  # it was surplus
        self._bucket.write(f"{place}/{MANIFEST}", manifest)
        self._whole[name] = manifest
        return True

    def _manifest(self, name: str) -> bytes:
        if name not in self._whole:
            self._whole[name] = self._bucket.read(f"{CHECKPOINTS}/{name}/{MANIFEST}") or b""
        return self._whole[name]

    def _remove(self, name: str) -> None:
        """The manifest first: without it there is no checkpoint."""
        self._whole.pop(name, None)
        self._sent.pop(f"{CHECKPOINTS}/{name}/{EVALUATION}", None)
        self._bucket.remove(f"{CHECKPOINTS}/{name}/{MANIFEST}")
        self._bucket.remove(f"{CHECKPOINTS}/{name}")

    def _surplus(self, names: list[str], there: set[str]) -> list[str]:
        """Checkpoints there, and parts of some, that need not stay; `names` are those here."""
        whole = complete(there)
        values = {int(name.removeprefix("step_")): self._value(name, there) for name in whole}
        stay = {*names, *whole} - {*map(step_name, self._retention.surplus(values))} | {*names}
        found = {part[1] for part in map(PART.fullmatch, there) if part}
        # a later one than the newest here is from before the run went back
        return sorted(name for name in found if name not in stay or name > names[-1])

    def _value(self, name: str, there: set[str]) -> float | None:
        place = f"{CHECKPOINTS}/{name}/{EVALUATION}"
        if not self._retention.keep_best or place not in there:
            return None
        evaluation = json.loads(self._bucket.read(place) or b"{}")
        value: float | None = evaluation.get("metrics", {}).get(self._retention.metric)
        return value


def changing_files(folder: Path) -> Iterator[Path]:
    """All files of a run folder that are copied and may change: what was measured of a checkpoint,
    but not what is in it, nor what is hidden or of this place alone.
    """
    own = {folder / OWNER, folder / CHECKPOINTS / LATEST}
    for root, folders, files in os.walk(folder):
        here = Path(root)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if here.parent == folder / CHECKPOINTS:  # a checkpoint, or one that was set aside
            folders.clear()
            files = [EVALUATION] if EVALUATION in files and STEP.fullmatch(here.name) else []
        paths = (here / name for name in sorted(files) if not name.startswith("."))
        yield from (path for path in paths if path not in own)


def complete(names: set[str]) -> list[str]:
    """The checkpoints among the files of a copy that have a manifest, oldest first."""
    return sorted(part[1] for part in map(PART.fullmatch, names) if part and part[2] == MANIFEST)
