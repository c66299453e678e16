"""Weights & Biases behind the same interface as TensorBoard (`pip install wandb`).

Where and whether it sends is wandb's own affair: `wandb login`, or WANDB_MODE=offline. The id of
its run lies in the run folder, so that a resumed run goes on as the same one and `--fresh`, which
moves the folder aside, begins another.

Steps are a metric of our own, the x axis of all others: wandb's own counter only ever rises and
drops what a resumed or rolled-back run logs for steps below the highest it has seen.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

ID_FILE = "wandb_id"
STEP = "step"


class WandbWriter:
    """Logs to the run that belongs to `folder`; wandb is imported only here.

    Args:
        folder: the run folder; its name is the run's.
        project, entity: as wandb.init takes them.
    """

    def __init__(self, folder: Path, project: str, entity: str | None = None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("wandb is missing: pip install wandb") from error
        self._wandb: Any = wandb
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / ID_FILE
        known = file.read_text(encoding="utf-8") if file.exists() else None
        self._run = wandb.init(
            project=project, entity=entity, name=folder.name, dir=str(folder),
            id=known, resume="allow",
        )  # fmt: skip
        file.write_text(self._run.id, encoding="utf-8")
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        self._row: dict[str, Any] = {}  # one row per step, sent when the next one begins

    def scalar(self, name: str, value: float, step: int) -> None:
        self._add(name, value, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        picture = self._wandb.Image(image.permute(1, 2, 0).numpy())
        self._add(name, picture, step)

    def text(self, name: str, text: str, step: int) -> None:
        page = self._wandb.Html(f"<pre>{html.escape(text)}</pre>")
        self._add(name, page, step)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        self._add(name, self._wandb.Histogram(list(values)), step)

    def hparams(self, values: dict[str, Any], metrics: Sequence[str]) -> None:
        self._run.config.update(values, allow_val_change=True)

    def rewind(self, step: int) -> None: ...  # its x axis may go back, see above

    def flush(self) -> None:
        if self._row:
            self._run.log(self._row)
        self._row = {}

    def close(self) -> None:
        self.flush()
        self._run.finish()

    def _add(self, name: str, value: Any, step: int) -> None:
        if self._row.get(STEP, step) != step:
            self.flush()
        self._row |= {STEP: step, name: value}
