"""What is told of a step: the progress line, the scalars, and now and then the gradients."""

from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.engine import Engine, StepResult
from routedvit.training.interfaces import MetricWriter, Progress
from routedvit.training.recipe.optim import learning_rate
from routedvit.training.recipe.schedules import Schedules
from routedvit.training.watch.gauges import ForwardCounter, memory, weight_decay
from routedvit.training.watch.gradients import gradient_norms
from routedvit.training.watch.meter import Meter
from routedvit.training.watch.stragglers import Stragglers


class StepLog:
    """Arguments as of `Trainer`, which calls it on all ranks alike."""

    def __init__(
        self,
        engine: Engine,
        schedules: Schedules,
        *,
        writer: MetricWriter,
        progress: Progress,
        meter: Meter,
        samples_per_epoch: int,
        forwards: ForwardCounter | None,
    ) -> None:
        self.engine = engine
        self.schedules = schedules
        self.writer = writer
        self.progress = progress
        self.meter = meter
        self.samples_per_epoch = samples_per_epoch
        self.forwards = forwards
        self.stragglers = Stragglers(engine, writer, progress.message)
        self.gradient_norms: dict[str, float] = {}  # of the last step that took them

    def log(self, result: StepResult, state: RunState) -> None:
        """Progress line and scalars since the last call. Collective."""
        step, rate = state.step, learning_rate(self.engine.optimizer)
        speed, waiting = self.meter.read()
        self.progress.update(step, result.loss, rate, speed)
        scalars = {
            "train/loss": result.loss,
            **{f"train/{name}": value for name, value in result.metrics.items()},
            "train/learning_rate": rate,
            **self.schedules.scalars(),
            "train/weight_decay": weight_decay(self.engine.optimizer),
            "train/gradient_norm": float(result.grad_norm),
            "train/skipped_steps": float(state.skipped_steps),
            "train/epoch": state.samples_seen / self.samples_per_epoch,
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
        self.stragglers.look(step, self.engine.forward_clock.read(), waiting)

    def take_gradient_norms(self) -> None:
        """Between backward and the optimiser's step, which is the only time they exist."""
        self.gradient_norms = gradient_norms(self.engine.full_gradients())

    def log_slowly(self, step: int) -> None:
        """What is too much for every logged step: norms per block and path, step times."""
        for place, norm in self.gradient_norms.items():
            self.writer.scalar(f"watch_gradients/{place}", norm, step)
        if seconds := self.meter.step_seconds():
            self.writer.histogram("speed/step_seconds", seconds, step)
