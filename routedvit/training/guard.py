"""Watches for steps that harm a run, names their samples, and says when to go back.

A step is bad if its loss or gradient was not finite (the engine has skipped it on all ranks then),
or, where asked for, if its loss stands out of those before it. `max_bad_steps` in a row, or
`max_spikes` of the second kind (which did act on the weights), are an alarm: the trainer goes back
to the last checkpoint before them and on with the data after them, as PaLM did by hand (2204.02311,
section 5.1: back about 100 steps, past 200 to 500 batches; spikes came from that data meeting those
weights, so other data helped). The data between are lost to the run; the ledger names them.

Losses are compared with those of steps of the same setting (image size, capacity) only, each over a
window of its own: else larger images or a smaller capacity would be a spike that never ends.

In fp16 an overflow with a finite loss is how the loss scale is found, and no bad step.

Costs nothing while all is well: it looks at numbers that are on the host already. Only a bad step
gathers keys and losses of the ranks. What it judges by is saved in each checkpoint, so that a
resumed run judges as an uninterrupted one.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from routedvit.training.config.run import ConfigError
from routedvit.training.engine import Engine, StepResult
from routedvit.training.interfaces import Batch


class Guard:
    """The watch over one run; the same decisions on all ranks. `watch` is collective.

    Args:
        engine: gathers what the ranks know.
        ledger: JSON lines, one per bad step and one per return to a checkpoint.
        max_bad_steps, max_rollbacks, forgive_after, spike_sigmas, spike_window, max_spikes: see
            `config.watch.GuardConfig`.
        tell: called with one line about each bad step.
    """

    def __init__(
        self,
        engine: Engine,
        ledger: Path,
        *,
        max_bad_steps: int = 10,
        max_rollbacks: int = 3,
        forgive_after: int = 1000,
        spike_sigmas: float | None = None,
        spike_window: int = 128,
        max_spikes: int | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.engine = engine
        self.ledger = ledger
        self.max_bad_steps = max_bad_steps
        self.max_rollbacks = max_rollbacks
        self.forgive_after = forgive_after
        self.spike_sigmas = spike_sigmas
        self.max_spikes = max_spikes or max_bad_steps
        self.tell = tell
        self.bad_steps: list[int] = []  # the present ones in a row, counted as finished
        self.returns = 0  # to a checkpoint, since the run was last well for long
        self._spikes = 0  # among the present bad steps
        self._good_steps = 0  # since the last return
        self._spike_window = spike_window
        self._losses: dict[str, deque[float]] = {}  # of good steps, by their setting

    @property
    def alarm(self) -> bool:
        """Whether the run should go back now."""
        return len(self.bad_steps) >= self.max_bad_steps or self._spikes >= self.max_spikes

    def state(self) -> dict[str, Any]:
        """What the next step is judged by, for `RunState.guard`."""
        return {
            "bad_steps": list(self.bad_steps),
            "spikes": self._spikes,
            "returns": self.returns,
            "good_steps": self._good_steps,
            "losses": {setting: list(losses) for setting, losses in self._losses.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; from none, which older checkpoints have, as at a first step."""
        self.bad_steps = list(state.get("bad_steps", []))
        self._spikes = state.get("spikes", 0)
        self.returns = state.get("returns", 0)
        self._good_steps = state.get("good_steps", 0)
        losses = state.get("losses", {})
        if isinstance(losses, list):  # of an older checkpoint, without settings
            losses = {"": losses}
        self._losses = {setting: self._window(values) for setting, values in losses.items()}

    def watch(
        self, result: StepResult, batches: Sequence[Batch], step: int, setting: str = ""
    ) -> None:
        """Judge the step that made `step` finished ones out of these micro-batches.

        `setting`: see `recipe.schedules.Dial.setting`.
        """
        if result.skipped and self.engine.scales_loss and math.isfinite(result.loss):
            self.tell(
                f"step {step} skipped: a gradient overflowed fp16; loss scale {result.loss_scale:g}"
            )
            return
        losses = self._losses.setdefault(setting, self._window())
        reason = self._reason(result, losses)
        if reason is None:
            self._note_good()
            if self.spike_sigmas:
                losses.append(result.loss)
            return
        self.bad_steps.append(step)
        self._spikes += not result.skipped
        keys = [key for batch in batches for key in batch["key"]]
        epoch = min(int(batch["epoch"].min()) for batch in batches)
        ranks = self.engine.gather((float(result.own_loss), epoch, keys))
        self._record(
            {
                "step": step,
                "epoch": min(epoch for _, epoch, _ in ranks),
                "reason": reason,
                "applied": not result.skipped,
                "loss": [loss for loss, _, _ in ranks],  # by rank, as are the keys
                "keys": [keys for _, _, keys in ranks],
            }
        )
        done = "skipped" if result.skipped else "suspicious"
        self.tell(f"step {step} {done}: its {reason}; its samples are in {self.ledger}")

    def give_up(self, why: str) -> ConfigError:
        """The words that end a run which going back cannot help."""
        first, last = self.bad_steps[0], self.bad_steps[-1]
        return ConfigError(
            f"steps {first} to {last} were bad and {why}; look at the samples in {self.ledger}, "
            "lower optim.lr, lengthen schedule.warmup_epochs or lower train.grad_clip, then start "
            "over with --fresh, or from a checkpoint with --set name=NEW --resume CHECKPOINT"
        )

    def went_back(self, step: int, passed_over: tuple[int, int]) -> None:
        """Tell of a return to `step`, past the data of these sample positions (first, end)."""
        self._record({"back_to_step": step, "never_trained_on": list(passed_over)})
        self.tell(
            f"back to step {step} after {len(self.bad_steps)} bad steps, and on without the "
            f"{passed_over[1] - passed_over[0]} samples from position {passed_over[0]} on"
        )

    def _window(self, losses: Sequence[float] = ()) -> deque[float]:
        return deque(losses, maxlen=self._spike_window)

    def _note_good(self) -> None:
        self.bad_steps.clear()
        self._spikes = 0
        self._good_steps += 1
        if self._good_steps >= self.forgive_after:
            self.returns = 0

    def _reason(self, result: StepResult, losses: deque[float]) -> str | None:
        if result.skipped:
            return "loss or gradient is not finite"
        if not self.spike_sigmas or len(losses) < self._spike_window:
            return None
        median = statistics.median(losses)
        # The median deviation is not moved by the outliers it must find; 1.48 of it is a sigma.
        deviation = 1.48 * statistics.median(abs(loss - median) for loss in losses)
        bound = median + self.spike_sigmas * max(deviation, 0.01 * abs(median))
        return f"loss {result.loss:.4g} is above {bound:.4g}" if result.loss > bound else None

    def _record(self, line: dict[str, Any]) -> None:
        """Append to the ledger; a disk that fails must not end the run."""
        if self.engine.rank == 0:
            try:
                self.ledger.parent.mkdir(parents=True, exist_ok=True)
                with self.ledger.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                self.tell(f"{self.ledger} cannot be written: {error}")
