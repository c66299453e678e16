"""The training loop: flat, so that the whole run can be read on one screen.

The trainer is given finished objects and knows no ZeRO stage, model or file format. Everything
below `fit` happens on all ranks at the same steps, since most of it communicates; what writes to
screen or disk is a null object on ranks other than 0.
"""

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.commit import SaveError
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.distributed.garbage import (
    collect_at,
    collected_at_will,
    collected_by_step,
)
from routedvit.training.distributed.patience import Patience
from routedvit.training.distributed.signals import StopSignals
from routedvit.training.engine import Engine, StepResult
from routedvit.training.evaluation import Evaluation, is_multiple
from routedvit.training.guard import Guard
from routedvit.training.interfaces import (
    Batch,
    Evaluator,
    MetricWriter,
    Progress,
    RoutingMonitor,
    TrainLoader,
)
from routedvit.training.recipe.schedules import Schedules
from routedvit.training.spent import Spent
from routedvit.training.trainer_settings import Summary, TrainerSettings, write_status
from routedvit.training.watch.gauges import ForwardCounter
from routedvit.training.watch.meter import Meter
from routedvit.training.watch.profiler import ProfilerWindow
from routedvit.training.watch.step_log import StepLog

SECONDS_TO_END = 60.0  # for a checkpoint that is being written when something else goes wrong


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
        patience: told of every step and of what may take longer; None: wait for ever.
        export: called on all ranks after the last step, before the run counts as finished.
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
        patience: Patience | None = None,
        export: Callable[[], None] | None = None,
    ) -> None:
        self.engine = engine
        self.loader = loader
        self.writer = writer
        self.monitor = monitor
        self.progress = progress
        self.checkpoints = checkpoints
        checkpoints.tell = progress.message  # does not tear the progress line
        self.guard = guard
        self.guard.restore(state.guard)
        self.schedules = schedules
        self.settings = settings
        self.state = state
        self.profiler = profiler
        self.spent = Spent(state.spent, engine.world_size)
        self.save_is_due = False  # since a step that had to be passed over
        self.signals = signals
        self.patience = patience or Patience()  # a new one waits for ever
        self.export = export
        self.meter = Meter(settings.batch_size)
        self.step_log = StepLog(
            engine, schedules, writer=writer, progress=progress, meter=self.meter,
            samples_per_epoch=loader.samples_per_epoch, forwards=forwards,
        )  # fmt: skip
        self.folder = checkpoints.folder.parent  # the run's
        self.evaluation = Evaluation(
            engine, evaluators, settings, retention=checkpoints.retention, writer=writer,
            progress=progress, folder=self.folder / "evaluation",
        )  # fmt: skip

    @collected_by_step()
    def fit(self) -> Summary:
        """Train to the end or until any rank wants to stop (distributed/signals.py), and save.

        A step is saved before it is evaluated, and an evaluation that did not come to its end is
        made up for by the next start, also of a run that has no more steps to go.
        """
        try:
            self.loop()
        finally:
            self.checkpoints.pending.let_it_end(SECONDS_TO_END)
        return self.finish()

    def loop(self) -> None:
        """All steps, and what comes with some of them."""
        settings = self.settings
        first, total = self.state.step + 1, settings.total_steps
        self.progress.start(self.state.step, total)
        self.note("running")
        stop = self.stop_wanted()  # while the run was built or loaded
        stop = stop or self.evaluate_due()
        batches = self.batches()
        while self.state.step < total and not stop:
            if self.profiler is not None:
                self.profiler.advance(self.state.step + 1)
            result = self.train_step(batches)
            self.patience.stepped(self.state.step)
            if self.checkpoints.pending and not result.writing:
                self.settle()
            collect_at(self.state.step)
            if self.guard.alarm:
                batches = self.go_back()
                continue
            step, last = self.state.step, self.state.step == total
            stop = result.stop

            if step % settings.log_every == 0 or step == first or last:
                self.step_log.log(result, self.state)
            if is_multiple(step, settings.gradients_every):
                self.step_log.log_slowly(step)
            self.save_is_due |= step % settings.checkpoint_every == 0
            if last or (self.save_is_due and not self.guard.bad_steps):
                self.save(must=last, in_background=not stop and self.goes_on())
            stop = stop or self.evaluate_due()
            if not stop and (step % settings.routing_every == 0 or step == first or last):
                self.watch_routing()
            if stop:
                self.save(must=True)

    def batches(self) -> Iterator[Batch]:
        """The micro-batches of the steps that are left, on their way to the device."""
        left = self.settings.total_steps - self.state.step
        return self.engine.ahead(self.loader.batches(start=self.state.samples_seen), left)

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
        norms_wanted = is_multiple(state.step + 1, self.settings.gradients_every)
        with self.schedules.at(state.step):
            result = self.engine.train_step(
                micro_batches,
                stop=self.signals.wanted,
                writing=self.checkpoints.pending.writing,
                before_step=self.step_log.take_gradient_norms if norms_wanted else None,
            )
        state.step += 1
        state.samples_seen += self.settings.batch_size
        state.skipped_steps += result.skipped
        state.metrics, state.evaluated = {}, []
        self.meter.add(time.perf_counter() - began, waited)
        self.guard.watch(result, micro_batches, state.step, self.schedules.setting())
        return result

    def go_back(self) -> Iterator[Batch]:
        """To the last checkpoint before the bad steps, and on with the data after them."""
        self.settle()
        before, done = self.state, self.guard.returns
        if done >= self.guard.max_rollbacks:
            raise self.guard.give_up(f"the run has gone back {done} times")
        first_bad, resume_at = self.guard.bad_steps[0], before.samples_seen
        with self.patience.busy():
            state = self.checkpoints.roll_back(first_bad, resume_at, returns=done + 1)
        if state is None:
            raise self.guard.give_up("there is no checkpoint from before them")
        first = self.checkpoints.rollbacks()[-1]["from"]
        self.guard.went_back(state.step, (first, resume_at))
        self.guard.restore(state.guard)
        self.writer.rewind(state.step)
        self.save_is_due = False
        self.state = dataclasses.replace(
            state,
            skipped_steps=before.skipped_steps,
            config=before.config,
            versions=before.versions,
        )
        return self.batches()

    def goes_on(self) -> bool:
        """Whether the next thing to do is a step, beside which a checkpoint may be written.

        An evaluation is not: should it crash, the step that it is of must have been saved.
        """
        if self.state.step == self.settings.total_steps or self.evaluation.due(self.state):
            return False
        return self.settings.save_in_background

    def settle(self) -> None:
        """Make a checkpoint visible that was written in the background; wait for it if need be."""
        with self.patience.busy():
            self.checkpoints.settle()

    def save(self, *, must: bool, in_background: bool = False) -> None:
        """Save a checkpoint; if the disk refuses one that need not be, warn and go on."""
        self.save_is_due = False
        self.writer.flush()  # a resume from here goes on where the curves end
        self.state.guard = self.guard.state()
        self.state.spent = self.spent.total(self.meter.steps)
        try:
            with self.patience.busy():
                self.checkpoints.save(
                    self.state, bad_since=self.bad_since(), in_background=in_background
                )
        except SaveError as error:
            if must:
                newest = next(reversed(self.checkpoints.names()), "the beginning")
                raise SaveError(f"{error}; the same command then goes on from {newest}") from error
            self.progress.message(f"{error}; the run goes on and tries again at the next one")

    def bad_since(self) -> int | None:
        """The first of the present bad steps."""
        return self.guard.bad_steps[0] if self.guard.bad_steps else None

    def evaluate_due(self) -> bool:
        """Run the evaluators that are due, until a rank wants to stop; whether one did."""
        for evaluator in self.evaluation.due(self.state):
            self.settle()
            if self.stop_wanted():  # an evaluation may take longer than a scheduler waits
                return True
            self.evaluate(evaluator)
        return False

    def evaluate(self, evaluator: Evaluator) -> None:
        """Run one evaluator, save the step if it is among the best, and note what was found."""
        with self.patience.busy(), collected_at_will():
            self.evaluation.run(evaluator, self.state)
        if not self.guard.bad_steps and self.checkpoints.wants(self.state):
            self.save(must=False)
        self.checkpoints.add_evaluation(self.state, bad_since=self.bad_since())

    def watch_routing(self) -> None:
        """Statistics and pictures of the routers on the probe images."""
        if self.monitor is not None:
            with self.patience.busy(), self.engine.evaluating() as model:
                self.monitor.run(model, self.state.step)

    def finish(self) -> Summary:
        """Export, close what is open and leave a word for whoever started the run."""
        self.checkpoints.fence.check()
        if self.profiler is not None:
            self.profiler.close()
        self.progress.close()
        self.writer.flush()
        state = self.state
        finished = state.step >= self.settings.total_steps and not self.evaluation.due(state)
        if finished and self.export is not None:
            with self.patience.busy():
                self.export()
        self.note("finished" if finished else "stopped")
        with self.patience.busy():
            self.checkpoints.close()
        self.engine.close()
        return Summary(
            step=state.step,
            finished=finished,
            best=dict(state.best),
            images_per_second=self.meter.average(),
            skipped_steps=state.skipped_steps,
            checkpoint=self.checkpoints.path_of(state.step),
            steps=self.meter.steps,
            seconds=self.spent.seconds(),
            spent=self.spent.total(self.meter.steps),
            data_wait_share=self.meter.average_wait(),
        )

    def note(self, status: str) -> None:
        """Leave a word in the run folder, see `write_status`."""
        if self.engine.rank != 0:
            return
        try:
            write_status(self.folder, status, self.state.step)
        except OSError as error:
            self.progress.message(f"status.json does not say {status!r}: {error}")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator a step can draw from (dropout, drop-path) by what the step is.

    Random numbers then depend on nothing that happened before, so a resumed run draws the same ones
    without saved generator states, whatever evaluation or logging drew in between.
    """
    words = np.random.SeedSequence((seed, step, rank)).generate_state(2)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words)
    random.seed(int(words[0]))
