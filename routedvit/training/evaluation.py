"""When each evaluator runs, on which weights, and what of it the run remembers."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.engine import Engine
from routedvit.training.evaluators import record
from routedvit.training.interfaces import Evaluator, MetricWriter, Progress
from routedvit.training.trainer_settings import TrainerSettings
from routedvit.training.watch.progress import evaluation_line


class Evaluation:
    """All evaluators of a run; the same on all ranks.

    Args:
        engine: whose weights are evaluated.
        evaluators: each runs at its own cadence and after the last step.
        settings: the last step, and which weights.
        retention: says which metric decides, and which of two values is better.
        writer, progress: told the values; null ones on ranks other than 0.
        folder: for tables, see `evaluators.record`.
    """

    def __init__(
        self,
        engine: Engine,
        evaluators: Sequence[Evaluator],
        settings: TrainerSettings,
        *,
        retention: Retention,
        writer: MetricWriter,
        progress: Progress,
        folder: Path,
    ) -> None:
        self.engine = engine
        self.evaluators = evaluators
        self.settings = settings
        self.retention = retention
        self.writer = writer
        self.progress = progress
        self.folder = folder
        self._ran: set[str] = set()
        self._found: set[str] = set()  # names of all values, of this start

    def due(self, state: RunState) -> list[Evaluator]:
        """Those that belong to the present step and have not come to their end there yet."""
        last = state.step == self.settings.total_steps
        return [
            evaluator
            for evaluator in self.evaluators
            if kind_of(evaluator) not in state.evaluated
            and (last or (state.step > 0 and is_multiple(state.step, evaluator.every_steps)))
        ]

    def run(self, evaluator: Evaluator, state: RunState) -> None:
        """Evaluate raw and averaged weights; adds to `state` the values and the best so far."""
        values: dict[str, float] = {}
        if self.settings.evaluate_raw:
            values |= self._measure(evaluator, evaluator.name, state.step)
        if self.settings.evaluate_ema:
            with self.engine.ema_weights():
                values |= self._measure(evaluator, f"{evaluator.name}_ema", state.step)
        for name, value in values.items():
            self.writer.scalar(name, value, state.step)
        state.metrics |= values
        state.evaluated = [*state.evaluated, kind_of(evaluator)]
        prefix, _, metric = self.retention.metric.rpartition("/")
        for best in (f"{prefix}/{metric}", f"{prefix}_ema/{metric}"):
            if best in values:
                before = state.best.get(best, values[best])
                state.best[best] = self.retention.better(values[best], before)
        self.progress.message(evaluation_line(state.step, values))
        self._miss_the_decisive(evaluator, values)
        self.writer.flush()  # what the state says was evaluated is not evaluated again

    def _miss_the_decisive(self, evaluator: Evaluator, values: Iterable[str]) -> None:
        """Say once, when every evaluator has run, that none gave the metric of the best ones."""
        before = len(self._ran)
        self._ran.add(kind_of(evaluator))
        self._found |= {*values}
        if before == len(self._ran) or len(self._ran) < len(self.evaluators):
            return
        if self.retention.keep_best and self.retention.metric not in self._found:
            self.progress.message(
                f"warning: checkpoint.best_metric = {self.retention.metric!r} is not among what "
                f"was evaluated, so none of the best is kept; there are: "
                f"{', '.join(sorted(self._found))}"
            )

    def _measure(self, evaluator: Evaluator, prefix: str, step: int) -> dict[str, float]:
        """What an evaluator says about the present weights, by 'prefix/metric'."""
        folder = self.folder if self.engine.rank == 0 else None
        with self.engine.evaluating() as model:
            findings = evaluator.run(model)
            tell = self.progress.message
            return record(findings, prefix, step, writer=self.writer, folder=folder, tell=tell)


def kind_of(evaluator: Evaluator) -> str:
    """What tells it from the others: its class too, since several write under one name."""
    return f"{type(evaluator).__name__}:{evaluator.name}"


def is_multiple(step: int, every: int) -> bool:
    """Whether a cadence of `every` steps comes round at `step`; never if it is 0."""
    return every > 0 and step % every == 0
