"""The training loop: flat, so that the whole run can be read on one screen.

The trainer is given finished objects and knows no ZeRO stage, model or file format. Everything
below `fit` happens on all ranks at the same steps, since most of it communicates; what writes to
screen or disk is a null object on ranks other than 0.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler

from routedvit.training.checkpoint import Checkpoints, RunState, write_json
from routedvit.training.config import ConfigError
from routedvit.training.engine import Engine, StepResult
from routedvit.training.interfaces import (
    Batch,
    Evaluator,
    MetricWriter,
    Progress,
    RoutingMonitor,
    TrainLoader,
)
from routedvit.training.meter import Meter
from routedvit.training.optim import learning_rate
from routedvit.training.progress import evaluation_line
from routedvit.training.signals import StopSignals

MAX_SKIPPED_IN_A_ROW = 25  # fp16 needs a dozen to find its loss scale


@dataclass(frozen=True)
class TrainerSettings:
    """Lengths and cadences of a run, in optimiser steps."""

    total_steps: int
    batch_size: int  # global: images per optimiser step
    seed: int
    log_every: int
    checkpoint_every: int
    routing_every: int
    best_metric: str = "val/top1"  # higher is better


@dataclass(frozen=True)
class Summary:
    """How a call of `fit` ended."""

    step: int
    finished: bool  # False: a signal stopped the run; start it again to go on
    best: dict[str, float]
    images_per_second: float  # of the whole world while training; 0 if there was nothing to do
    skipped_steps: int
    checkpoint: Path


class Trainer:
    """Runs an engine over a loader until `total_steps` or a signal.

    Args:
        engine: holds objective, model and optimiser.
        loader: endless micro-batches by global position.
        evaluators: run at their own cadence and after the last step.
        writer: scalars; the null writer on ranks other than 0.
        monitor: routing statistics and pictures, or None for a model that does not route.
        progress: the progress line; the null one on ranks other than 0.
        checkpoints: where to save.
        schedule: over `engine.optimizer`.
        settings: lengths and cadences.
        state: where to begin: `checkpoints.load_newest()` or a fresh `RunState`.
    """

    def __init__(
        self,
        engine: Engine,
        loader: TrainLoader,
        *,
        evaluators: Sequence[Evaluator],
        writer: MetricWriter,
        monitor: RoutingMonitor | None,
        progress: Progress,
        checkpoints: Checkpoints,
        schedule: Scheduler,
        settings: TrainerSettings,
        state: RunState,
    ) -> None:
        self.engine = engine
        self.loader = loader
        self.evaluators = evaluators
        self.writer = writer
        self.monitor = monitor
        self.progress = progress
        self.checkpoints = checkpoints
        self.schedule = schedule
        self.settings = settings
        self.state = state
        self.signals = StopSignals()
        self.meter = Meter(settings.batch_size)
        self.skipped_in_a_row = 0

    def fit(self) -> Summary:
        """Train to the end, or until any rank wants to stop (see signals.py); saves either way."""
        state, settings = self.state, self.settings
        first, total, stop = state.step + 1, settings.total_steps, False
        self.progress.start(state.step, total)
        with self.signals:  # before the loader forks its workers, so that they survive them too
            batches = self.loader.batches(start=state.samples_seen)
            while state.step < total and not stop:
                result = self.train_step(batches)
                step, last = state.step, state.step == total
                stop = result.stop and not last

                if step % settings.log_every == 0 or step == first or last:
                    self.log(result)
                if not stop:
                    for evaluator in self.evaluators:
                        if last or (evaluator.every_steps and step % evaluator.every_steps == 0):
                            self.evaluate(evaluator)
                    if step % settings.routing_every == 0 or step == first or last:
                        self.watch_routing()
                if step % settings.checkpoint_every == 0 or last or stop:
                    self.checkpoints.save(state)
        return self.finish()

    def train_step(self, batches: Iterator[Batch]) -> StepResult:
        """One optimiser step on the next global batch."""
        state = self.state
        began = time.perf_counter()
        micro_batches = [next(batches) for _ in range(self.engine.accumulation)]
        waited = time.perf_counter() - began
        seed_step(self.settings.seed, state.step, self.engine.rank)
        self.schedule.step_update(state.step)
        result = self.engine.train_step(micro_batches, stop=self.signals.wanted)
        state.step += 1
        state.samples_seen += self.settings.batch_size
        self.meter.add(time.perf_counter() - began, waited)
        if result.skipped:
            self.count_skipped(result)
        else:
            self.skipped_in_a_row = 0
        return result

    def count_skipped(self, result: StepResult) -> None:
        """A step whose loss or gradient was not finite left the weights alone; never silently."""
        state = self.state
        state.skipped_steps += 1
        self.skipped_in_a_row += 1
        scale = f"; loss scale {result.loss_scale:g}" if result.loss_scale else ""
        self.progress.message(
            f"step {state.step} skipped: its loss or gradient is not finite{scale}"
        )
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise ConfigError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row up to step {state.step} were not finite; "
                "lower optim.lr, lengthen schedule.warmup_epochs or lower train.grad_clip, then "
                "start again: the run goes on from its newest checkpoint"
            )

    def log(self, result: StepResult) -> None:
        """Progress line and scalars since the last call."""
        step, rate = self.state.step, learning_rate(self.engine.optimizer)
        speed, waiting = self.meter.read()
        self.progress.update(step, result.loss, rate, speed)
        scalars = {
            "train/loss": result.loss,
            **{f"train/{name}": value for name, value in result.metrics.items()},
            "train/learning_rate": rate,
            "train/gradient_norm": float(result.grad_norm),
            "train/skipped_steps": float(self.state.skipped_steps),
            "train/epoch": self.state.samples_seen / self.loader.samples_per_epoch,
            "speed/images_per_second": speed,
            "speed/data_wait_share": waiting,
        }
        if result.loss_scale is not None:
            scalars["train/loss_scale"] = result.loss_scale
        if self.engine.device.type == "cuda":
            scalars["speed/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        for name, value in scalars.items():
            self.writer.scalar(name, value, step)

    def evaluate(self, evaluator: Evaluator) -> None:
        """Run one evaluator and keep the best value of `best_metric`."""
        state = self.state
        with self.engine.evaluating() as model:
            values = {f"{evaluator.name}/{name}": v for name, v in evaluator.run(model)}
        for name, value in values.items():
            self.writer.scalar(name, value, state.step)
        best = self.settings.best_metric
        if best in values:
            state.best[best] = max(values[best], state.best.get(best, values[best]))
        self.progress.message(evaluation_line(state.step, values))

    def watch_routing(self) -> None:
        """Statistics and pictures of the routers on the probe images."""
        if self.monitor is not None:
            with self.engine.evaluating() as model:
                self.monitor.run(model, self.state.step)

    def finish(self) -> Summary:
        """Close what is open and leave a word for whoever started the run.

        The launcher's exit code cannot tell a run that was stopped and saved from a crash
        (DeepSpeed's is 1 for both), so `status.json` in the run folder does.
        """
        self.progress.close()
        self.writer.flush()
        state = self.state
        finished = state.step >= self.settings.total_steps
        folder = self.checkpoints.folder
        if self.engine.rank == 0:
            status = {"status": "finished" if finished else "stopped", "step": state.step}
            write_json(folder.parent / "status.json", status)
        return Summary(
            step=state.step,
            finished=finished,
            best=dict(state.best),
            images_per_second=self.meter.average(),
            skipped_steps=state.skipped_steps,
            checkpoint=self.checkpoints.path_of(state.step),
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator a step can draw from (dropout, mixup) by what the step is.

    Random numbers then depend on nothing that happened before, so a resumed run draws the same ones
    without saved generator states, whatever evaluation or logging drew in between.
    """
    words = np.random.SeedSequence((seed, step, rank)).generate_state(2)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words)
    random.seed(int(words[0]))
