"""Scalars as lines of a CSV file: for a spreadsheet, pandas, or a plot that TensorBoard lacks.

    step,name,value

One line per scalar, so that a new one needs no new column. A resume drops the lines that the
interrupted run wrote beyond it. Pictures, text and histograms have no place here.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

COLUMNS = ["step", "name", "value"]


class CsvWriter:
    """Appends to `path`.

    Args:
        path: made, with its folder, if it does not exist.
        resume_step: finished steps when the run starts; later lines are removed.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._open(resume_step)

    def _open(self, step: int) -> None:
        path = self._path
        part = path.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow(COLUMNS)
            if path.exists():
                lines.writerows(_lines_up_to(path, step))
        part.replace(path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._lines = csv.writer(self._file)

    def scalar(self, name: str, value: float, step: int) -> None:
        self._lines.writerow([step, name, value])

    def image(self, name: str, image: Tensor, step: int) -> None: ...

    def text(self, name: str, text: str, step: int) -> None: ...

    def histogram(self, name: str, values: Sequence[float], step: int) -> None: ...

    def hparams(self, values: dict[str, Any], metrics: Sequence[str]) -> None: ...

    def rewind(self, step: int) -> None:
        self._file.close()
        self._open(step)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines_up_to(path: Path, step: int) -> Iterator[list[str]]:
    """Whole lines of earlier steps: a run that was killed may have left half a line.

    One after the other, since a long run has millions.
    """
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.reader(file):
            if len(line) == len(COLUMNS) and line[0].isdigit() and int(line[0]) <= step:
                yield line
