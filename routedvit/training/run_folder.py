"""The run folder: where a run writes, and the guard that one folder holds one run.

    runs/NAME/config.json    the resolved config, git revision and versions
             owner.json      which start of the run writes here, see checkpoints/ownership.py
             checkpoints/    one folder a checkpoint, and `latest`
             events.*        TensorBoard's files, here so that the run shows under its own name
             logs/           what each rank printed; ledgers of bad samples and bad steps
             weights/        the exported model
             weights_ema/    the same with averaged weights, if the run keeps an average
             evaluation/     the evaluators' newest tables, while it trains
             evaluated/      what `--evaluate` found later, a folder each
             exported/       what `--export` wrote, likewise
             status.json     'running', 'stopped' or 'finished', and the step
             begun.json      which --resume and --fresh were obeyed, see repeated.py
             metrics.csv, profile/    with log.csv and log.profile_steps

A folder that already holds another run is refused instead of being resumed with a different recipe;
`--fresh` moves the old one aside, so nothing is ever deleted.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routedvit.training.checkpoints.manifest import numbered, replace_text
from routedvit.training.checkpoints.ownership import Owner, refuse_beside_the_living, take
from routedvit.training.checkpoints.publishing import (
    clear_hidden,
    publish_written,
    written_whole,
)
from routedvit.training.checkpoints.shelf import names_in
from routedvit.training.config.differences import describe_differences, differences, is_free
from routedvit.training.config.run import ConfigError
from routedvit.training.provenance import git_revision, versions

# Keys a resumed run may change: they alter what is seen, kept or how the work is split over
# machines, never which numbers the run computes (up to rounding, and to which images drop-path and
# dropout draw).
FREE_ON_RESUME = (
    "name", "about", "output_dir", "eval", "checkpoint", "guard", "log", "deepspeed",
    "train.micro_batch_size", "train.grad_checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths inside the folder of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def ema_weights(self) -> Path:
        return self.path / "weights_ema"

    @property
    def evaluated(self) -> Path:
        return self.path / "evaluated"

    def has_checkpoint(self) -> bool:
        """Whether a run in this folder would be resumed, from one that is yet to be published too.

        Raises:
            ConfigError: nobody can tell.
        """
        try:
            return bool(names_in(self.checkpoints) or written_whole(self.checkpoints))
        except OSError as error:
            raise ConfigError(
                f"{self.checkpoints} cannot be read ({error}); see to the disk and its rights"
            ) from error


def open_folder(
    folder: RunFolder,
    config: dict[str, Any],
    *,
    fresh: bool,
    free: tuple[str, ...],
    resume: Path | None = None,
) -> tuple[str, Owner]:
    """Claim the folder, with `fresh` after moving an earlier run aside; one line for people.

    Raises:
        ConfigError: another process of this machine runs in it, the disk does not take it, the
            checkpoint `resume` is not there or would be moved, or see `claim`.
    """
    if resume is not None:
        check_resume(folder, resume, config, fresh=fresh)
    try:
        refuse_beside_the_living(folder.path)
        moved = move_aside(folder) if fresh else None
        claim(folder, config, free=free)
        owner = take(folder.path)
        written = publish_written(folder.checkpoints)
        clear_hidden(folder.checkpoints)
    except OSError as error:
        raise ConfigError(
            f"output_dir: the run folder {folder.path} cannot be used ({error}); see to the room "
            "on its disk and to its rights, or set output_dir to another"
        ) from error
    told = f" (the earlier run is kept in {moved})" if moved else ""
    told += "".join(
        f" ({name} was written when an earlier start died; it counts)" for name in written
    )
    return f"run folder {folder.path}{told}", owner


def check_resume(
    folder: RunFolder, checkpoint: Path, config: dict[str, Any], *, fresh: bool
) -> None:
    """Before the folder is touched: is the checkpoint there, will it stay, and is the state in it
    of the same optimiser?
    """
    found = _named(folder, checkpoint)
    refuse_whole_run(folder, found, "--resume")
    if not found.is_dir():
        raise ConfigError(
            f"--resume {checkpoint}: there is no such folder, and {folder.checkpoints} holds "
            + (", ".join(names_in(folder.checkpoints)) or "no checkpoint")
        )
    own = {folder.path.resolve(), folder.checkpoints.resolve()}  # which may be a link
    if fresh and own & {*found.resolve().parents}:
        raise ConfigError(
            f"--resume {checkpoint} goes on with the run in {folder.path}, which --fresh would "
            "move aside; leave --fresh out, or give the new run another name (--set name=...)"
        )

    saved = _saved_config(found)
    if saved is None:
        return  # the load says what is wrong with it
    for key in ("name", "options"):
        before, now = (tree.get("optim", {}).get(key) for tree in (saved, config))
        if before != now and saved.get("optim"):
            raise ConfigError(
                f"--resume {checkpoint} holds the state of another optimiser: optim.{key} was "
                f"{json.dumps(before)}, is {json.dumps(now)}; set it back, or begin from the "
                "weights alone: --export them and set model.warm_start to that folder"
            )


def refuse_whole_run(folder: RunFolder, given: Path, option: str) -> None:
    """Raises ConfigError where `option` was `given` all of a run in place of a checkpoint."""
    for shelf in (given, given / folder.checkpoints.name):
        if shelf.is_dir() and (names := names_in(shelf)):
            own = shelf.resolve() == folder.checkpoints.resolve() and option != "--resume"
            latest = "'latest', or " if own else ""
            raise ConfigError(
                f"{option} {given}: that is the folder of a run; name {latest}one of its "
                f"checkpoints, such as {shelf / names[-1]}"
            )


def earlier_config(folder: RunFolder, *, fresh: bool, resume: Path | None) -> dict[str, Any] | None:
    """The config of what a start goes on from: the run in the folder, or else the checkpoint
    `resume`; None where it begins anew, or the checkpoint does not say.
    """
    try:
        own = None if fresh else _own_config(folder)
    except OSError:
        return None  # `open_folder` says what is wrong with it
    if own is not None or resume is None:
        return own
    return _saved_config(_named(folder, resume))


def _own_config(folder: RunFolder) -> dict[str, Any] | None:
    """That of the run in the folder; None without a checkpoint that another recipe could spoil.

    A config.json that was cut, when a machine lost power, or is gone is made up for by the newest
    checkpoint that says.

    Raises:
        ConfigError: it was cut, and none tells.
    """
    if not folder.has_checkpoint():
        return None
    there = folder.config.exists()
    text = folder.config.read_bytes() if there else b""  # what the disk refuses is no damage
    with contextlib.suppress(ValueError, KeyError, TypeError):
        config: dict[str, Any] = json.loads(text)["config"]
        return config
    visible = (folder.checkpoints / name for name in reversed(names_in(folder.checkpoints)))
    for path in (*visible, *written_whole(folder.checkpoints)):
        if saved := _saved_config(path):
            return saved
    if not there:
        return None
    raise ConfigError(
        f"{folder.config} is damaged and no checkpoint beside it says what its config was; put a "
        "copy back, or delete the file, and the run goes on with the config of this start"
    )


def _named(folder: RunFolder, checkpoint: Path) -> Path:
    """A checkpoint by its name in the folder, or by its path."""
    own = folder.checkpoints / checkpoint
    return own if own.is_dir() else checkpoint


def _saved_config(checkpoint: Path) -> dict[str, Any] | None:
    """The config that a checkpoint was saved with; None where it cannot be read."""
    try:
        state = json.loads((checkpoint / "run_state.json").read_text(encoding="utf-8"))
        config: dict[str, Any] = state["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return config


def claim(folder: RunFolder, config: dict[str, Any], *, free: tuple[str, ...] = ()) -> None:
    """Make the folder this run's, or check that it already is. Rank 0 only.

    Args:
        config: the resolved run config.
        free: dotted keys beyond `FREE_ON_RESUME` that may differ from the earlier run's; a * in one
            stands for any one name.

    Raises:
        ConfigError: the folder holds checkpoints of a run whose config differs in any other key.
    """
    if (before := _own_config(folder)) is not None:
        free = FREE_ON_RESUME + free
        differing = [key for key in differences(before, config) if not is_free(key, free)]
        if differing:
            place = "output_dir" if config.get("output_dir") else "name"
            names = names_in(folder.checkpoints)
            begin = names and (
                f", and to begin where that one is add --resume {folder.checkpoints / names[-1]}"
            )
            described = describe_differences(differing, before, config)
            raise ConfigError(
                f"{folder.path} holds another run: {described}; "
                f"give this one another {place} (--set {place}=...){begin or ''}; or start over "
                "with --fresh"
            )
    folder.path.mkdir(parents=True, exist_ok=True)
    record = {"config": config, "git_revision": git_revision(), "versions": versions()}
    replace_text(folder.config, json.dumps(record, indent=2) + "\n")


def check_same_data(folder: RunFolder, before: tuple[str, str], now: tuple[str, str]) -> None:
    """The order of samples follows from the training shards, and the best metric so far means
    something on the same held-out ones only; so a run that goes on needs the same ones.

    A run that only begins from another's checkpoint may take others.

    Args:
        before: training and held-out shards of the checkpoint; empty where it does not say.
        now: those that the run would go on with.

    Raises:
        ConfigError: they are not the same.
    """
    if not folder.has_checkpoint():
        return
    for section, earlier, later in zip(("train", "val"), before, now, strict=True):
        if earlier not in ("", later):
            raise ConfigError(
                f"data.{section}: {folder.path} was run on {earlier}, and now there are {later}; "
                "bring the earlier shards back, begin a run of another name from this one (--set "
                f"name=NEW --resume {folder.checkpoints}/...) or start over with --fresh"
            )


def move_aside(folder: RunFolder) -> Path | None:
    """Rename an existing run folder to the first free NAME.1, NAME.2, ...; returns the new path."""
    if not folder.path.exists():
        return None
    return folder.path.rename(next(path for path in numbered(folder.path) if not path.exists()))


def first_free(path: Path) -> Path:
    """Make the first folder of NAME, NAME.1, NAME.2, ... that does not exist, and return it."""
    for target in numbered(path):
        with contextlib.suppress(FileExistsError):
            target.mkdir(parents=True)
            return target
    raise AssertionError("there is always another number")
