"""Checkpoints of the fake engine, saved, loaded, damaged and cut short."""

from __future__ import annotations

from pathlib import Path

from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.run_state import RunState
from tests.unit.training.fake_engine import FakeEngine

STATE = "shards/rank_00001_00.safetensors"


class Killed(BaseException):
    pass


def die(*args: object) -> None:
    raise Killed


def save(engine, folder: Path, step: int, keep: int = 3) -> Path:
    engine.value = step
    checkpoints = Checkpoints(folder, engine, keep=keep)
    path = checkpoints.save(RunState(step=step, samples_seen=8 * step))
    checkpoints.shelf.finish_deletion()
    return path


def load(folder: Path, told: list[str] | None = None) -> tuple[RunState | None, FakeEngine]:
    engine = FakeEngine()
    engine.value = -1
    lines = told if told is not None else []
    return Checkpoints(folder, engine, keep=3, tell=lines.append).load_newest(), engine


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / STATE).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / STATE).write_bytes(data)
