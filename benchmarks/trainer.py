"""Step time of the trainer with everything on beside a bare PyTorch loop, in one run, interleaved.

    python -m benchmarks.trainer --rounds 3 --steps 60

Both train the same model with the same optimiser on the same batches from memory: whenever the
trainer asks for its next batch, the bare loop makes a step first, so that a slow moment of the
machine falls on both. One process; the trainer runs under DeepSpeed as the config says, with
TensorBoard, CSV, routing pictures and gradient norms. What it adds per step (the engine, the loop)
and what it does every so often (a logged step, norms per place, pictures) are timed apart, the
latter by their median and spread over their cadence. Reading data, evaluation and checkpoints are
left out: a bare loop would need them too.

Bars: a step at most 1.05 times the bare one, logging and pictures at most 3 % of it.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_input_data_config
from torch import nn

import routedvit  # noqa: F401  (registers the models)
from benchmarks.results import append_result
from routedvit.training import engine as engines
from routedvit.training.assembly import build_engine, build_trainer
from routedvit.training.assembly_watch import build_run_evaluators
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.file import load_config
from routedvit.training.config.native import zero_stage
from routedvit.training.config.run import RunConfig
from routedvit.training.distributed.signals import StopSignals
from routedvit.training.interfaces import EvalLoaders
from routedvit.training.model import create_model
from routedvit.training.objectives import build_loss
from routedvit.training.recipe.optim import build_optimizer
from routedvit.training.watch.console import Console

WARMUP = 5
EVERY = {"log": "every_steps", "log_slowly": "gradients_every_steps",
         "take_gradient_norms": "gradients_every_steps",
         "watch_routing": "routing_every_steps"}  # fmt: skip
DEFAULTS = {"every_steps": 10, "gradients_every_steps": 200, "routing_every_steps": 200}


class BareLoop:
    """What a tutorial would write: forward, backward, clip, step."""

    def __init__(self, config: RunConfig) -> None:
        self.model = create_model(config.model, num_classes=10, seed=config.seed)
        self.loss = build_loss(config.loss.name, config.loss.label_smoothing)
        self.optimizer = build_optimizer(
            self.model, **config.optim.arguments(config.train.batch_size)
        )
        self.grad_clip = config.train.grad_clip

    def step(self, image: torch.Tensor, target: torch.Tensor) -> float:
        loss = self.loss(self.model(image), target)
        self.optimizer.zero_grad()
        loss.backward()
        if self.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        return float(loss.detach())


class Interleaved:
    """A loader that lets the bare loop make a step before it gives the trainer its batch.

    `seconds` has the steps of both, in wall and processor time; those of the trainer hold all that
    happens between one request and the next.
    """

    samples_per_epoch, num_classes, num_samples = 4000, 10, 8
    mean, std = (0.5,), (0.5,)
    fingerprint = "random"

    def __init__(self, shape: tuple[int, ...], batch_size: int, bare: BareLoop) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape, self.batch_size, self.bare = shape, batch_size, bare
        self.images = torch.randn(4, batch_size, *shape, generator=generator)
        self.targets = torch.randint(0, 10, (4, batch_size), generator=generator)
        self.seconds: dict[str, list[float]] = {
            name: [] for name in ("bare", "trainer", "bare cpu", "trainer cpu")
        }

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        asked = 0
        while True:
            image, target = self.images[asked % 4], self.targets[asked % 4]
            with self.clock("bare"):
                self.bare.step(image, target)
            position = torch.arange(self.batch_size) + asked * self.batch_size
            asked += 1
            with self.clock("trainer"):
                yield {"image": image, "target": target, "position": position}

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Wall and processor time of what happens in it; the second is deaf to other programs."""
        began, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[f"{name} cpu"].append(time.process_time() - cpu)
        self.seconds[name].append(time.perf_counter() - began)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        valid = torch.ones(self.num_samples, dtype=torch.bool)
        rows = {"image": self.images[0], "target": self.targets[0]}
        yield {key: value[: self.num_samples] for key, value in rows.items()} | {"valid": valid}

    def probe(self, n: int) -> torch.Tensor:
        return self.images[0, :n]


def timed(target: Any, names: list[str]) -> dict[str, list[float]]:
    """Wrap methods of an object; returns the seconds of each call, filled as they come."""
    seconds: dict[str, list[float]] = defaultdict(list)

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args)
            finally:
                seconds[name].append(time.perf_counter() - began)

        return wrapper

    for name in names:
        setattr(target, name, wrap(name, getattr(target, name)))
    return seconds


def one_round(config: RunConfig, folder: Path) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of plain steps of both, and the median seconds of each occasional thing."""
    world = engines.start()
    model = create_model(config.model, num_classes=10, seed=config.seed)
    shape = resolve_input_data_config(model)["input_size"]
    loader = Interleaved(shape, config.train.batch_size, BareLoop(config))
    engine, schedule = build_engine(config, model, world, loader)
    held_out = EvalLoaders(loader, None)
    trainer = build_trainer(
        config, engine, schedule, loader, held_out,
        evaluators=build_run_evaluators(
            config, engine.objective, held_out, loader.samples_per_epoch
        ),
        checkpoints=Checkpoints(folder / "checkpoints", engine, keep=1),
        state=RunState(), folder=folder, console=Console(1), signals=StopSignals(),
    )  # fmt: skip
    *logs, watch = EVERY
    logged, watched = timed(trainer.step_log, logs), timed(trainer, [watch])
    trainer.fit()
    log = config.log.model_dump()
    busy = {
        step
        for key in set(EVERY.values())
        for step in range(1, len(loader.seconds["trainer"]) + 1)
        if step % log[key] == 0
    }
    plain = {
        name: [s for step, s in enumerate(seconds, 1) if step > WARMUP and step not in busy]
        for name, seconds in loader.seconds.items()
    }
    # The first of each opens files, loads fonts and warms caches.
    occasional = logged | watched
    return plain, {name: statistics.median(each[1:]) for name, each in occasional.items()}


class BenchmarkConfig(RunConfig):
    """A run's config; what it reads does not matter here."""

    data: Any = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    fixed = {
        "train.epochs": "null", "train.steps": args.steps, "eval": '{"every_epochs": 1e6}',
        "schedule": '{"name": "constant"}', "checkpoint": '{"every_steps": 1000000000}',
        "log": '{"csv": true, "every_steps": 5, "gradients_every_steps": 10, '
               '"routing_every_steps": 20}',
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in fixed.items()]
    config = load_config(BenchmarkConfig, args.config, overrides + args.set)
    config.model.kwargs.setdefault("num_classes", 10)

    steps: dict[str, list[float]] = defaultdict(list)
    rounds: list[float] = []
    extra: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            plain, occasional = one_round(config, Path(folder))
        for name, seconds in plain.items():
            steps[name] += seconds
        rounds.append(statistics.median(plain["trainer"]) / statistics.median(plain["bare"]))
        for name, seconds_each in occasional.items():
            extra[name].append(seconds_each)
    stage = zero_stage(config.deepspeed)
    case = f"{config.model.name} batch {config.train.batch_size} ZeRO-{stage}"
    report(case, steps, rounds, extra)


def report(
    case: str,
    steps: dict[str, list[float]],
    rounds: list[float],
    extra: dict[str, list[float]],
) -> None:
    """Print the ratios and append a row each to results.csv."""
    bare = statistics.median(steps["bare"])
    ratio = statistics.median(steps["trainer"]) / bare
    each = ", ".join(f"{value:.3f}" for value in rounds)
    print(f"{case}: bare {bare * 1e3:.1f} ms, trainer {ratio:.3f} x (rounds: {each})")
    cpu = statistics.median(steps["trainer cpu"]) / statistics.median(steps["bare cpu"])
    print(f"  in processor time {cpu:.3f} x")
    for name in ("bare", "trainer"):
        milliseconds = [second * 1e3 for second in steps[name]]
        append_result(
            "trainer", f"{case} {name}", milliseconds, unit="ms", baseline="bare",
            ratio=statistics.median(milliseconds) / bare / 1e3,
        )  # fmt: skip
    shares = []
    for name, key in EVERY.items():
        cost = statistics.median(extra[name])
        shares.append(cost / DEFAULTS[key] / bare)
        print(f"  {name:20s} {cost * 1e3:8.2f} ms, every {DEFAULTS[key]} steps: {shares[-1]:.2%}")
    print(f"  logging and pictures together {sum(shares):.2%}")
    append_result(
        "trainer", f"{case} logging and pictures", [100 * sum(shares)], unit="%",
        baseline="bare", ratio=sum(shares),
    )  # fmt: skip


if __name__ == "__main__":
    main()
