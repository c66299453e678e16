"""The copy of a run (`checkpoint.mirror`), as a start sees it: fetch, check, keep up to date."""

from collections.abc import Callable
from functools import cached_property

from routedvit.training.checkpoints.bucket import Bucket
from routedvit.training.checkpoints.fetching import CopyUnreachable, check_copy, fetch_run
from routedvit.training.checkpoints.mirror import Mirror
from routedvit.training.checkpoints.ownership import Owner
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.distributed.collective import on_rank_zero
from routedvit.training.run_folder import RunFolder
from routedvit.training.watch.secrets import without_secrets


class RunCopy:
    """Every method is collective; rank 0 alone asks the store. Without a URL none does anything.

    Args:
        url: `checkpoint.mirror`; the copy is the folder there of the run folder's name.
        folder: of the run.
        tell: called on rank 0 with lines for people.

    Methods raise ConfigError on all ranks, see `fetching`.
    """

    def __init__(self, url: str | None, folder: RunFolder, tell: Callable[[str], None]) -> None:
        self._url = None if url is None else f"{url.rstrip('/')}/{folder.path.resolve().name}"
        self._folder = folder
        self._tell = tell
        self._was_fetched = False

    @property
    def place(self) -> str | None:
        """Where it is, for people."""
        return None if self._url is None else without_secrets(self._url)

    def fetch(self) -> None:
        """Give a folder without checkpoints what the copy has."""
        if self._url is not None:
            self._was_fetched = on_rank_zero(self._fetch)

    def check(self, *, fresh: bool, resumes: bool) -> None:
        """Whether the run that is to be may copy there, see `check_copy`."""
        if self._url is not None:
            on_rank_zero(lambda: self._check(fresh, resumes))

    def begin(self, owner: Owner, retention: Retention) -> Mirror | None:
        """From now on it is this start's; rank 0 gets what keeps it up to date."""
        mirror: Mirror | None = None

        def begin() -> None:
            nonlocal mirror
            mirror = Mirror(self._folder.path, self._bucket, retention=retention, owner=owner.id)
            try:
                mirror.begin()
            except OSError as error:
                if not self._folder.has_checkpoint():
                    raise CopyUnreachable(f"checkpoint.mirror: {error}") from error
                self._tell(f"{error}; the run goes on, and the next save tries again")

        if self._url is not None:
            on_rank_zero(begin)
        return mirror

    @cached_property
    def _bucket(self) -> Bucket:
        assert self._url is not None
        return Bucket(self._url)

    def _fetch(self) -> bool:
        bucket = self._bucket  # a URL that nobody can serve is refused, whatever is here
        return not self._folder.has_checkpoint() and fetch_run(
            self._folder.path, bucket, self._tell
        )

    def _check(self, fresh: bool, resumes: bool) -> None:
        if self._was_fetched and not fresh:
            return
        try:
            check_copy(self._folder.path, self._bucket, fresh=fresh, resumes=resumes)
        except OSError as error:
            self._tell(f"{error}; the run goes on from {self._folder.path}")
