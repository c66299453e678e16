"""The same command once more: a scheduler that starts a run again repeats `--resume` and `--fresh`.

Both are wishes about the first start. Obeyed at each, they would throw away what was trained in
between. So the start that obeys them leaves a note in the run folder, and its repetition goes on
from the newest checkpoint:

- `--resume X` is done if the newest start had it too. A start without it clears the note; then the
  same words mean going back once more, and so they do when people type them after the run's end.
- `--fresh` is done if a scheduler says that it restarts the job of the note. People who type it
  again mean it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from routedvit.training.checkpoints.manifest import replace_text
from routedvit.training.run_folder import RunFolder
from routedvit.training.trainer_settings import has_finished

NOTE = "begun.json"
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
JOBS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")


class Wish(NamedTuple):
    """How a start is to begin."""

    resume: Path | None
    fresh: bool

    @property
    def words(self) -> str:
        """'--resume step_00000500', as it was typed."""
        resume = f"--resume {self.resume}" if self.resume else ""
        return " ".join(filter(None, ("--fresh" if self.fresh else "", resume)))


def still_wanted(wish: Wish, folder: RunFolder, environment: Mapping[str, str]) -> Wish:
    """What of `wish` an earlier start of the same command has not done yet. Rank 0."""
    if not folder.has_checkpoint():
        return wish
    done, job = _noted(folder)
    restarted = any(environment.get(name, "0") not in ("", "0") for name in RESTARTS)
    resume, fresh = wish
    if fresh and done.fresh and restarted and job == _job(environment):
        fresh = False
    if resume is not None and resume == done.resume and not fresh:
        here = folder.checkpoints.resolve()
        own = (here / resume).is_dir() or resume.resolve().parent == here
        if restarted or not own or not has_finished(folder.path):
            resume = None
    return Wish(resume, fresh)


def note(wish: Wish, folder: RunFolder, environment: Mapping[str, str]) -> None:
    """The start has done what `wish` says, or a start before it has. Rank 0."""
    resume = None if wish.resume is None else str(wish.resume)
    content = {"resume": resume, "fresh": wish.fresh, "job": _job(environment)}
    replace_text(folder.path / NOTE, json.dumps(content) + "\n")


def _noted(folder: RunFolder) -> tuple[Wish, str]:
    """What was noted, and in which job."""
    try:
        found = json.loads((folder.path / NOTE).read_text(encoding="utf-8"))
        resume = Path(found["resume"]) if found["resume"] else None
        return Wish(resume, bool(found["fresh"])), str(found["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return Wish(None, False), ""


def _job(environment: Mapping[str, str]) -> str:
    return next((environment[name] for name in JOBS if name in environment), "")
