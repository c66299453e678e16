"""What a rank fails of reaches the ranks that wait for it, on other machines too.

An error of one rank between two collectives leaves the others in the second. The launcher ends
those on the same machine; on others NCCL would let them wait for minutes and then say nothing of
why. So a rank that fails leaves a line in the store through which the ranks have met, and each
rank has a thread that looks there once a second: a question of a few bytes to rank 0's store.

Where the store does not answer (rank 0 is gone, and its store with it) nothing is heard, and the
bounds of patience.py remain. torchrun gives each of its restarts keys of its own.
"""

import contextlib
import threading

import torch.distributed as dist
from torch.distributed import distributed_c10d

KEY = "routedvit/last_words"
SPEAK_SECONDS = 2.0  # a machine without power takes no words
LISTEN_SECONDS = 1.0


class LastWords:
    """The one line that all ranks of a world may write and read.

    Args:
        store: through which they have met; never waited for by the caller.
        listen_seconds: between two looks.
    """

    def __init__(self, store: dist.Store, *, listen_seconds: float = LISTEN_SECONDS) -> None:
        # a connection of its own, for a store does one thing at a time
        self._store = store.clone()
        self._listen_seconds = listen_seconds
        self.heard: str | None = None
        self._over = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="last words", daemon=True)
        self._listener.start()

    def say(self, words: str) -> None:
        """Leave a line for the others, unless one was heard; takes `SPEAK_SECONDS` at most."""
        if self.heard is None:
            speaker = threading.Thread(target=self._say, args=(words,), daemon=True)
            speaker.start()
            speaker.join(SPEAK_SECONDS)

    def close(self) -> None:
        """Listen no more: a thread inside the store would abort an interpreter that ends."""
        self._over.set()
        self._listener.join(SPEAK_SECONDS)

    def _say(self, words: str) -> None:
        with contextlib.suppress(RuntimeError):  # rank 0 has gone first
            self._store.set(KEY, words)

    def _listen(self) -> None:
        with contextlib.suppress(RuntimeError):  # as above
            while self.heard is None and not self._over.wait(self._listen_seconds):
                if self._store.check([KEY]):
                    self.heard = self._store.get(KEY).decode()


def last_words() -> LastWords | None:
    """Those of the world that this process belongs to; None if it is alone."""
    if dist.get_world_size() == 1:
        return None
    return LastWords(distributed_c10d._get_default_store())
