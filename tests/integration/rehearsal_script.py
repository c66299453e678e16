"""Peaks of real steps on two ranks, for test_rehearsal.py.

python rehearsal_script.py OUT OVERRIDES...      each of them some --set, apart by spaces; writes
                                                 OUT/RUN_RANK, the peak in bytes
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from worlds import in_world

import train
from routedvit.training.assembly import build_engine
from routedvit.training.config.file import load_config
from routedvit.training.distributed.world import World
from routedvit.training.memory import MemoryMeter
from routedvit.training.model import create_model

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.json")
LOADER = SimpleNamespace(mean=(0.1,), std=(0.3,), samples_per_epoch=4000)


def peak(world: World, overrides: list[str]) -> int:
    """Bytes of the tensors of the second step, where they are most."""
    config = load_config(train.RunConfig, QUICKSTART, overrides)
    size = config.train.micro_batch_size
    with MemoryMeter() as meter:
        model = create_model(config.model, num_classes=10, seed=0)
        engine, _ = build_engine(config, model, world, LOADER)  # type: ignore[arg-type]
        batch = {
            "image": torch.randn(size, 1, 28, 28),
            "target": torch.zeros(size, dtype=torch.int64),
            "position": torch.arange(size),
        }
        for _ in range(2):
            meter.reset_peak()
            engine.train_step([batch] * engine.accumulation)
    return meter.peak


def main(out: Path, runs: list[str]) -> None:
    for number, overrides in enumerate(runs):

        def write(world: World, name: str = f"{number}", words: str = overrides) -> None:
            (out / f"{name}_{world.rank}").write_text(str(peak(world, words.split())))

        in_world(2, write)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
