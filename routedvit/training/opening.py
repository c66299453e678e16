"""How a start opens the folder of its run: it goes on from a checkpoint there, or begins anew."""

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.copying import RunCopy
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.distributed.agreement import check_shared_folder
from routedvit.training.distributed.collective import on_rank_zero
from routedvit.training.engine import Engine
from routedvit.training.provenance import versions
from routedvit.training.repeated import Wish, note, still_wanted
from routedvit.training.run_folder import RunFolder, check_same_data, earlier_config, open_folder
from routedvit.training.watch.console import Console
from routedvit.training.watch.secrets import command_line


def wish_of(asked: Wish, folder: RunFolder, tell: Callable[[str], None]) -> Wish:
    """What a start does of what it was asked for; a line if that is less. Collective."""
    wish = on_rank_zero(lambda: still_wanted(asked, folder, os.environ))
    if wish != asked:
        tell(f"{asked.words} was obeyed by an earlier start; going on from the newest")
    return wish


def keep_order(data: Any, folder: RunFolder, wish: Wish, tell: Callable[[str], None]) -> None:
    """Go on in the order of samples that a run began in, unless another is asked for. Collective.

    Runs from before there was `data.shard_start` have no such key, and null is what they did.

    Args:
        data: the section of the config; its shard_start is set.
        folder: of the run.
        wish: how it is to begin.
        tell: called with a line if the order is another than the config's.
    """

    def begun_in() -> Any:
        before = earlier_config(folder, fresh=wish.fresh, resume=wish.resume)
        if before is None or "shard_start" in data.model_fields_set:
            return data.shard_start
        return before["data"].get("shard_start")

    shard_start = on_rank_zero(begun_in)
    if shard_start != data.shard_start:
        data.shard_start = shard_start
        tell(f"data.shard_start is {json.dumps(shard_start)}, as the run began")


def open_run(
    record: dict[str, Any],
    engine: Engine,
    folder: RunFolder,
    console: Console,
    *,
    asked: Wish,
    wish: Wish,
    retention: Retention,
    read: tuple[str, str],
    free: tuple[str, ...],
    copy: RunCopy,
) -> tuple[Checkpoints, RunState]:
    """Claim the folder, and load the checkpoint that the run goes on from. Collective.

    Only once all parts are built, since a run that cannot be must not claim or move a folder.

    Args:
        record: the resolved config, as it is kept.
        engine: is given the state of the checkpoint.
        folder: of the run.
        console: its log goes there from now on.
        asked, wish: what the start was asked for, and what of it is still to be done.
        retention: which checkpoints to keep.
        read: names training and held-out shards by their content.
        free: dotted keys that a resume may change, beyond those of this package.
        copy: of the run; kept up to date from now on.

    Returns:
        The checkpoints, and the state to begin with: a fresh one if there is none.
    """
    claims = partial(open_folder, folder, record, fresh=wish.fresh, free=free, resume=wish.resume)
    opened, owner = on_rank_zero(claims)
    console.print(opened)
    check_shared_folder(folder.path)
    console.log_to(folder.logs / f"rank_{engine.rank}.log", command_line())
    checkpoints = Checkpoints(
        folder.checkpoints, engine, keep=retention, owner=owner, tell=console.print,
        mirror=copy.begin(owner, retention),
    )  # fmt: skip
    state = checkpoints.load_named(wish.resume) if wish.resume else checkpoints.load_newest()
    on_rank_zero(lambda: note(asked, folder, os.environ))
    state = state or RunState()
    check_same_data(folder, (state.data, state.held_out), read)
    # of this start: a resume may change some
    state.config, state.versions = record, versions()
    state.data, state.held_out = read
    return checkpoints, state
