"""Tells what started this run that it got further, so that a crash after that is worth another try.

A scheduler's script does not know the run folder, which is in the config. It names a file in
`ROUTEDVIT_PROGRESS`, and rank 0 touches it after every checkpoint: launch/slurm.sbatch puts a job
that crashed back into the queue where the file is there, and not where it is missing, since a crash
that comes before the first checkpoint would come again.
"""

import os
from pathlib import Path

VARIABLE = "ROUTEDVIT_PROGRESS"


def note_progress() -> None:
    """Touch the file, if one is named; a failure is not worth the run."""
    if name := os.environ.get(VARIABLE):
        try:
            Path(name).touch()
        except OSError as error:
            print(f"{VARIABLE}={name} cannot be written: {error}")
