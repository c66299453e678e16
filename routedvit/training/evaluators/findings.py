"""What an evaluator finds besides numbers, and where a finding goes.

An evaluator yields (name, finding). Numbers go back to the caller; a table becomes a CSV file in
the run folder and, with its first rows, text in the logs; a picture becomes a picture. So
evaluators know neither steps nor folders, and the same object serves during training and
afterwards, on raw and on averaged weights.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from routedvit.training.interfaces import Finding, MetricWriter, Table


def record(
    findings: Iterable[tuple[str, Finding]],
    prefix: str,
    step: int,
    *,
    writer: MetricWriter,
    folder: Path | None,
    tell: Callable[[str], None] = print,
) -> dict[str, float]:
    """Writes tables and pictures that an evaluator yields, and returns its numbers.

    Args:
        findings: `evaluator.run(model)`; consumed on every rank.
        prefix: of the names, 'val', or 'val_ema' where averaged weights are in place.
        writer: the null writer on ranks other than 0.
        folder: for tables, one CSV file each, the newest only; None on ranks other than 0.
        tell: called with one line about a file that the disk did not take; that ends no run.

    Returns:
        {'prefix/name': value}, equal on all ranks.
    """
    numbers: dict[str, float] = {}
    for name, finding in findings:
        tag = f"{prefix}/{name}"
        if isinstance(finding, Table):
            writer.text(tag, markdown(finding), step)
            if folder is not None:
                try_write_csv(folder / f"{tag.replace('/', '_')}.csv", finding, tell)
        elif isinstance(finding, Tensor):
            writer.image(tag, finding, step)
        else:
            numbers[tag] = finding
    return numbers


def markdown(table: Table) -> str:
    """The rows worth a look as a Markdown table, and how many more there are."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows[: table.shown]]
    text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    hidden = len(table.rows) - table.shown
    return text + (f"\n\n{hidden} more rows in the run folder" if hidden > 0 else "")


def try_write_csv(path: Path, table: Table, tell: Callable[[str], None]) -> None:
    """Replace `path` by the table, or tell why not."""
    try:
        write_csv(path, table)
    except OSError as error:
        tell(f"{path} was not written: {error}")


def write_csv(path: Path, table: Table) -> None:
    """Replace `path` by the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([table.columns, *table.rows])
    part.replace(path)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
