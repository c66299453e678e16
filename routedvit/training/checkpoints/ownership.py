"""Which start of a run writes its folder: the newest, by the file owner.json in it.

Two launches can meet in one folder: a job is requeued while its first life still runs on a machine
that nobody reaches, or a command is typed twice. Each start writes owner.json and owns the folder
from then on. An older one looks before it writes, publishes or deletes a checkpoint, and stops in
words once the file names another; nothing of the newer run is touched.

There is no lock. flock does not hold between machines on many shared file systems, and a lock that
outlives its holder would block the requeue. The price are the milliseconds between a look and the
rename after it, in which an older start may still publish a checkpoint (a whole one).

Only where the owner is known to live, on the same machine, is the newer start refused instead: a
process is known by its pid, its time of birth and the boot of its machine, so that neither a pid
that is used again nor a restored folder is taken for it.
"""

import os
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pydantic

from routedvit.training.checkpoints.manifest import replace_text
from routedvit.training.config.base import ConfigError
from routedvit.training.distributed.proc import birth_of, boot_id

OWNER = "owner.json"


class Owner(pydantic.BaseModel, frozen=True):
    """One start of a run, by the process of its rank 0."""

    id: str
    host: str
    pid: int
    since: str  # UTC, for people
    boot: str = ""  # of the machine; empty where it does not say
    birth: str | None = None  # of the process, see `birth_of`

    @classmethod
    def this_process(cls) -> "Owner":
        """A new start by the calling process."""
        return cls(
            id=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            boot=boot_id(),
            birth=birth_of(os.getpid()),
        )

    def lives_beside_us(self) -> bool:
        """Whether it is another process of this machine that has not ended."""
        known = self.boot == boot_id() and self.birth is not None
        return known and self.pid != os.getpid() and birth_of(self.pid) == self.birth

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def read_owner(folder: Path) -> Owner | None:
    """Who owns a run folder; None if no file says so, or none that can be understood."""
    try:
        return Owner.model_validate_json((folder / OWNER).read_bytes())
    except (FileNotFoundError, pydantic.ValidationError):
        return None


def refuse_beside_the_living(folder: Path) -> None:
    """Before a start changes anything in `folder`.

    Raises:
        ConfigError: its owner still runs on this machine.
    """
    owner = read_owner(folder)
    if owner is not None and owner.lives_beside_us():
        raise ConfigError(
            f"{folder} is in use by another start of this run ({owner}); stop that one first "
            f"(`kill {owner.pid}`: it saves and ends), or give this run another name "
            "(--set name=...)"
        )


def take(folder: Path) -> Owner:
    """Make this process the owner of `folder`, whoever was. Rank 0."""
    owner = Owner.this_process()
    replace_text(folder / OWNER, owner.model_dump_json(indent=2) + "\n")
    return owner


def lost_to(folder: Path, owner: Owner) -> str | None:
    """Why `owner` must not write in `folder` any more, in words; None if it still owns it."""
    try:
        present = read_owner(folder)
    except OSError:  # says nothing; what is to be written next will fail by itself
        return None
    if present is None:
        return (
            f"{folder / OWNER} is gone or damaged: the folder was moved or cleared under this "
            "start, which stops; start again to go on with what is there"
        )
    if present.id == owner.id:
        return None
    return (
        f"another start of this run owns {folder} now ({present}); this one ({owner}) stops and "
        "leaves all as it is there; if it is this one that should go on, stop the other and start "
        "again"
    )
