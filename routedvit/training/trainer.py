"""The training loop: flat, so that the whole run can be read on one screen.

The trainer is given finished objects and knows no ZeRO stage, model or file format. Everything
below `fit` happens on all ranks at the same steps, since most of it communicates; what writes to
screen or disk is a null object on ranks other than 0.
"""

import dataclasses
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from routedvit.training.checkpoint import Checkpoints
from routedvit.training.commit import SaveError
from routedvit.training.engine import Engine, StepResult
from routedvit.training.evaluators import record
from routedvit.training.gauges import ForwardCounter, memory, weight_decay
from routedvit.training.gradients import gradient_norms
from routedvit.training.guard import Guard
from routedvit.training.interfaces import (
    Batch,
    Evaluator,
    MetricWriter,
    Progress,
    RoutingMonitor,
    TrainLoader,
)
from routedvit.training.manifest import replace_text
from routedvit.training.meter import Meter
from routedvit.training.optim import learning_rate
from routedvit.training.profiler import ProfilerWindow
from routedvit.training.progress import evaluation_line
from routedvit.training.run_state import RunState
from routedvit.training.schedules import Schedules
from routedvit.training.signals import StopSignals


@dataclasses.dataclass(frozen=True)
class TrainerSettings:
    """Lengths and cadences of a run, in optimiser steps."""

    total_steps: int
    batch_size: int  # global: images per optimiser step
    seed: int
    log_every: int
    checkpoint_every: int
    routing_every: int
    evaluate_raw: bool = True
    evaluate_ema: bool = False  # on the averaged weights, under names that end in _ema
    gradients_every: int = 0  # gradient norms and step-time histogram; 0: never


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a call of `fit` ended."""

    step: int
    finished: bool  # False: a signal stopped the run; start it again to go on
    best: dict[str, float]
    images_per_second: float  # of the whole world while training; 0 if there was nothing to do
    skipped_steps: int
    checkpoint: Path
    seconds: float = 0.0  # of this call, everything included
    data_wait_share: float = 0.0  # of the time in steps


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
        guard: watches for bad steps.
        schedules: what changes by step; its rates are those of `engine.optimizer`.
        forwards: counts what the network is given, or None.
        profiler: a window of steps to profile, or None.
        settings: lengths and cadences.
        state: where to begin: `checkpoints.load_newest()` or a fresh `RunState`.
        signals: wishes to stop, caught by the caller.
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
        guard: Guard,
        schedules: Schedules,
        settings: TrainerSettings,
        state: RunState,
        signals: StopSignals,
        forwards: ForwardCounter | None = None,
        profiler: ProfilerWindow | None = None,
    ) -> None:
        self.engine = engine
        self.loader = loader
        self.evaluators = evaluators
        self.writer = writer
        self.monitor = monitor
        self.progress = progress
        self.checkpoints = checkpoints
        self.guard = guard
        self.guard.restore(state.guard)
        self.schedules = schedules
        self.settings = settings
        self.state = state
        self.forwards = forwards
        self.profiler = profiler
        self.gradient_norms: dict[str, float] = {}  # of the last step that took them
        self.began = 0.0
        self.signals = signals
        self.meter = Meter(settings.batch_size)

    def fit(self) -> Summary:
        """Train to the end, or until any rank wants to stop (see signals.py); saves either way.

        A step is saved before it is evaluated, and an evaluation that did not come to its end is
        made up for by the next start, also of a run that has no more steps to go.
        """
        settings = self.settings
        first, total = self.state.step + 1, settings.total_steps
        self.began = time.perf_counter()
        self.progress.start(self.state.step, total)
        self.note("running")
        stop = self.stop_wanted()  # while the run was built or loaded
        stop = stop or self.evaluate_due()
        batches = self.loader.batches(start=self.state.samples_seen)
        while self.state.step < total and not stop:
            if self.profiler is not None:
                self.profiler.advance(self.state.step + 1)
            result = self.train_step(batches)
            if self.guard.alarm:
                batches = self.go_back()
                continue
            step, last = self.state.step, self.state.step == total
            stop = result.stop

            if step % settings.log_every == 0 or step == first or last:
                self.log(result)
            if settings.gradients_every and step % settings.gradients_every == 0:
                self.log_slowly()
            if last or (step % settings.checkpoint_every == 0 and not self.guard.bad_steps):
                self.save(must=last)
            stop = stop or self.evaluate_due()
            if not stop and (step % settings.routing_every == 0 or step == first or last):
                self.watch_routing()
            if stop:
                self.save(must=True)
        return self.finish()

    def stop_wanted(self) -> bool:
        """Whether any rank wants to stop. Collective."""
        return any(self.engine.gather(self.signals.wanted))

    def train_step(self, batches: Iterator[Batch]) -> StepResult:
        """One optimiser step on the next global batch."""
        state = self.state
        began = time.perf_counter()
        micro_batches = [next(batches) for _ in range(self.engine.accumulation)]
        waited = time.perf_counter() - began
        seed_step(self.settings.seed, state.step, self.engine.rank)
        every = self.settings.gradients_every
        norms_wanted = every > 0 and (state.step + 1) % every == 0
        with self.schedules.at(state.step):
            result = self.engine.train_step(
                micro_batches,
                stop=self.signals.wanted,
                before_step=self.take_gradient_norms if norms_wanted else None,
            )
        state.step += 1
        state.samples_seen += self.settings.batch_size
        state.skipped_steps += result.skipped
        state.metrics, state.evaluated = {}, []
        self.meter.add(time.perf_counter() - began, waited)
        self.guard.watch(result, micro_batches, state.step)
        return result

    def go_back(self) -> Iterator[Batch]:
        """To the last checkpoint before the bad steps, and on with the data after them."""
        before, done = self.state, self.guard.returns
        if done >= self.guard.max_rollbacks:
            raise self.guard.give_up(f"the run has gone back {done} times")
        first_bad, resume_at = self.guard.bad_steps[0], before.samples_seen
        state = self.checkpoints.roll_back(first_bad, resume_at, returns=done + 1)
        if state is None:
            raise self.guard.give_up("there is no checkpoint from before them")
        first = self.checkpoints.rollbacks()[-1]["from"]
        self.guard.went_back(state.step, (first, resume_at))
        self.guard.restore(state.guard)
        self.state = dataclasses.replace(
            state,
            skipped_steps=before.skipped_steps,
            config=before.config,
            versions=before.versions,
        )
        return self.loader.batches(start=state.samples_seen)

    def save(self, *, must: bool) -> None:
        """Save a checkpoint; if the disk refuses one that need not be, warn and go on."""
        self.writer.flush()  # a resume from here goes on where the curves end
        self.state.guard = self.guard.state()
        try:
            self.checkpoints.save(self.state, bad_since=self.bad_since())
        except SaveError as error:
            if must:
                raise
            self.progress.message(f"{error}; the run goes on and tries again at the next one")

    def log(self, result: StepResult) -> None:
        """Progress line and scalars since the last call."""
        step, rate = self.state.step, learning_rate(self.engine.optimizer)
        speed, waiting = self.meter.read()
        self.progress.update(step, result.loss, rate, speed)
        scalars = {
            "train/loss": result.loss,
            **{f"train/{name}": value for name, value in result.metrics.items()},
            "train/learning_rate": rate,
            **self.schedules.scalars(),
            "train/weight_decay": weight_decay(self.engine.optimizer),
            "train/gradient_norm": float(result.grad_norm),
            "train/skipped_steps": float(self.state.skipped_steps),
            "train/epoch": self.state.samples_seen / self.loader.samples_per_epoch,
            "speed/images_per_second": speed,
            "speed/data_wait_share": waiting,
        }
        scalars |= memory(self.engine.device)
        if self.forwards is not None:
            scalars |= self.forwards.read(speed)
        if result.loss_scale is not None:
            scalars["train/loss_scale"] = result.loss_scale
        for name, value in scalars.items():
            self.writer.scalar(name, value, step)

    def take_gradient_norms(self) -> None:
        """Between backward and the optimiser's step, which is the only time they exist."""
        self.gradient_norms = gradient_norms(self.engine.full_gradients())

    def log_slowly(self) -> None:
        """What is too much for every logged step: norms per block and path, step times."""
        for place, norm in self.gradient_norms.items():
            self.writer.scalar(f"watch_gradients/{place}", norm, self.state.step)
        if seconds := self.meter.step_seconds():
            self.writer.histogram("speed/step_seconds", seconds, self.state.step)

    def bad_since(self) -> int | None:
        """The first of the present bad steps."""
        return self.guard.bad_steps[0] if self.guard.bad_steps else None

    def is_due(self, evaluator: Evaluator) -> bool:
        """Whether an evaluator belongs to the present step and has not finished there yet."""
        step, every = self.state.step, evaluator.every_steps
        last = step == self.settings.total_steps
        cadence = step > 0 and every > 0 and step % every == 0
        return (last or cadence) and evaluator.name not in self.state.evaluated

    def evaluate_due(self) -> bool:
        """Run the evaluators that are due, until a rank wants to stop; whether one did."""
        for evaluator in filter(self.is_due, self.evaluators):
            if self.stop_wanted():  # an evaluation may take longer than a scheduler waits
                return True
            self.evaluate(evaluator)
        return False

    def evaluate(self, evaluator: Evaluator) -> None:
        """Run one evaluator, on raw and averaged weights, and keep the best of what decides."""
        state = self.state
        values: dict[str, float] = {}
        if self.settings.evaluate_raw:
            values |= self.measure(evaluator, evaluator.name)
        if self.settings.evaluate_ema:
            with self.engine.ema_weights():
                values |= self.measure(evaluator, f"{evaluator.name}_ema")
        for name, value in values.items():
            self.writer.scalar(name, value, state.step)
        state.metrics |= values
        state.evaluated = [*state.evaluated, evaluator.name]
        retention = self.checkpoints.retention
        prefix, _, metric = retention.metric.rpartition("/")
        for best in (f"{prefix}/{metric}", f"{prefix}_ema/{metric}"):
            if best in values:
                before = state.best.get(best, values[best])
                state.best[best] = retention.better(values[best], before)
        self.progress.message(evaluation_line(state.step, values))
        self.writer.flush()  # what the checkpoint says was evaluated is not evaluated again
        if not self.guard.bad_steps and self.checkpoints.wants(state):
            self.save(must=False)
        self.checkpoints.add_evaluation(state, bad_since=self.bad_since())

    def measure(self, evaluator: Evaluator, prefix: str) -> dict[str, float]:
        """What an evaluator says about the present weights, by 'prefix/metric'."""
        folder = self.checkpoints.folder.parent / "evaluation" if self.engine.rank == 0 else None
        with self.engine.evaluating() as model:
            findings = evaluator.run(model)
            return record(findings, prefix, self.state.step, writer=self.writer, folder=folder)

    def watch_routing(self) -> None:
        """Statistics and pictures of the routers on the probe images."""
        if self.monitor is not None:
            with self.engine.evaluating() as model:
                self.monitor.run(model, self.state.step)

    def finish(self) -> Summary:
        """Close what is open and leave a word for whoever started the run."""
        self.checkpoints.fence.check()
        if self.profiler is not None:
            self.profiler.close()
        self.progress.close()
        self.writer.flush()
        state = self.state
        finished = state.step >= self.settings.total_steps
        finished = finished and not any(map(self.is_due, self.evaluators))
        self.note("finished" if finished else "stopped")
        return Summary(
            step=state.step,
            finished=finished,
            best=dict(state.best),
            images_per_second=self.meter.average(),
            skipped_steps=state.skipped_steps,
            checkpoint=self.checkpoints.path_of(state.step),
            seconds=time.perf_counter() - self.began,
            data_wait_share=self.meter.average_wait(),
        )

    def note(self, status: str) -> None:
        """Leave `status.json` in the run folder.

        The launcher's exit code cannot tell a run that was stopped and saved from a crash
        (DeepSpeed's is 1 for both); 'running' without a process is a run that was killed.
        """
        if self.engine.rank == 0:
            folder = self.checkpoints.folder.parent
            folder.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"status": status, "step": self.state.step})
            replace_text(folder / "status.json", content + "\n")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator a step can draw from (dropout, drop-path) by what the step is.

    Random numbers then depend on nothing that happened before, so a resumed run draws the same ones
    without saved generator states, whatever evaluation or logging drew in between.
    """
    words = np.random.SeedSequence((seed, step, rank)).generate_state(2)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words)
    random.seed(int(words[0]))
