"""What a checkpoint costs the training: written in the background, and while all wait. Interleaved.

    python -m benchmarks.saving --rounds 7

One process trains a routed ViT on a batch from memory. A case takes a few steps, with a save before
them or without one. `held up` is the time in which no step can run: the save itself, and what it
takes to make the checkpoint visible. `in all` is what the steps with a save took longer than those
without, so it knows what writing takes from the processors and the memory that the steps want too.
Where a GPU computes, that is nearly nothing; on a CPU the writer's hashes compete with the steps.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from timm.data import resolve_input_data_config

import routedvit  # noqa: F401  (registers the models)
from benchmarks.results import report_measured
from benchmarks.trainer import BenchmarkConfig
from routedvit.training import engine as engines
from routedvit.training.assembly import wrap_objective
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.file import load_config
from routedvit.training.config.native import zero_stage
from routedvit.training.config.run import RunConfig
from routedvit.training.engine import Engine
from routedvit.training.interfaces import Batch
from routedvit.training.memory import readable
from routedvit.training.model import create_model
from routedvit.training.objectives import build_objective

WAITING, BACKGROUND, WITHOUT = "while all wait", "in the background", "without"


class Case:
    """An engine, its batch, and a folder for its checkpoints."""

    def __init__(self, config: RunConfig, engine: Engine, batch: Batch, folder: Path) -> None:
        self.engine = engine
        self.batch = batch
        self.checkpoints = Checkpoints(folder, engine, keep=1)
        self.saved = 0

    def steps(self, count: int, save: str) -> tuple[float, float]:
        """Seconds that `count` steps take with a save before them, and those without a step."""
        began, held_up = time.perf_counter(), 0.0
        if save != WITHOUT:
            self.saved += 1
            self.checkpoints.save(RunState(step=self.saved), in_background=save == BACKGROUND)
            held_up += time.perf_counter() - began
        for _ in range(count):
            writing = self.checkpoints.pending.writing
            result = self.engine.train_step([self.batch], writing=writing)
            if self.checkpoints.pending and not result.writing:
                held_up += self.settle()
        if self.checkpoints.pending:
            raise SystemExit(f"{count} steps are over before the disk is done; give --steps")
        return time.perf_counter() - began, held_up

    def settle(self) -> float:
        """Seconds that it takes to make what was written visible."""
        began = time.perf_counter()
        self.checkpoints.settle()
        return time.perf_counter() - began


def build(config: RunConfig, folder: Path) -> Case:
    """The network of a config, under its optimiser and ZeRO stage, on random images."""
    world = engines.start()
    model = create_model(config.model, num_classes=1000, seed=config.seed)
    size = config.train.batch_size
    objective = build_objective(
        config, model, micro_batch_size=size, device=world.device, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    engine, _ = wrap_objective(config, objective, world)
    images = torch.randn(size, *resolve_input_data_config(model)["input_size"], device=world.device)
    targets = torch.randint(0, 1000, (size,), device=world.device)
    positions = torch.arange(size, device=world.device)
    batch = {"image": images, "target": targets, "position": positions}
    return Case(config, engine, batch, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/vit_s.json")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="of each case in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    fixed = [f"train.batch_size={args.batch}", "train.micro_batch_size=null"]
    if not torch.cuda.is_available():
        fixed.append("precision.dtype=fp32")  # bf16 may have no units there
    config = load_config(BenchmarkConfig, args.config, fixed + args.set)
    config.model.kwargs.setdefault("num_classes", 1000)
    with tempfile.TemporaryDirectory() as folder:
        case = build(config, Path(folder))
        for save in (WITHOUT, BACKGROUND):  # the optimiser's state, and the allocators' caches
            case.steps(args.steps, save)
        in_all: dict[str, list[float]] = defaultdict(list)
        held_up: dict[str, list[float]] = defaultdict(list)
        for _ in range(args.rounds):
            bare, _ = case.steps(args.steps, WITHOUT)
            for save in (WAITING, BACKGROUND):
                seconds, without_a_step = case.steps(args.steps, save)
                in_all[save].append(seconds - bare)
                held_up[save].append(without_a_step)
        size = readable(case.engine.share_bytes())
        title = f"{config.model.name}, {size}, ZeRO-{zero_stage(config.deepspeed)}"
    for what, seconds_by_case in (("held up", held_up), ("in all", in_all)):
        report_measured(
            "saving", seconds_by_case, unit="s", baseline=WAITING, prefix=f"{title} {what} "
        )


if __name__ == "__main__":
    main()
