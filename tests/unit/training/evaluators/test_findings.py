"""Numbers go back, tables and pictures go where they can be seen."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from routedvit.training.evaluators.findings import markdown, record
from routedvit.training.interfaces import Table

TABLE = Table(("class", "top1"), [("cat|dog", 12.34567), ("cow", 50.0), ("hen", 60.0)], shown=2)


class Recorder:
    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], object] = {}

    def text(self, name: str, text: str, step: int) -> None:
        self.seen[name, step] = text

    def image(self, name: str, image: Tensor, step: int) -> None:
        self.seen[name, step] = image


def test_each_finding_goes_where_it_belongs(tmp_path: Path) -> None:
    writer, picture = Recorder(), torch.zeros(3, 2, 2, dtype=torch.uint8)
    findings = [("top1", 1.5), ("per_class", TABLE), ("plot", picture)]
    numbers = record(findings, "val_ema", 7, writer=writer, folder=tmp_path)  # type: ignore[arg-type]
    assert numbers == {"val_ema/top1": 1.5}
    assert writer.seen == {
        ("val_ema/per_class", 7): markdown(TABLE),
        ("val_ema/plot", 7): picture,
    }
    with (tmp_path / "val_ema_per_class.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["class", "top1"], ["cat|dog", "12.34567"], ["cow", "50.0"], ["hen", "60.0"]]


def test_other_ranks_write_no_files(tmp_path: Path) -> None:
    record([("per_class", TABLE)], "val", 7, writer=Recorder(), folder=None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_table_reads_well_as_text() -> None:
    lines = markdown(TABLE).splitlines()
    assert lines[:4] == ["| class | top1 |", "| --- | --- |", "| cat/dog | 12.35 |", "| cow | 50 |"]
    assert lines[-1] == "1 more rows in the run folder"


def test_a_table_that_the_disk_does_not_take_is_told_and_the_numbers_count(tmp_path: Path) -> None:
    (tmp_path / "val_per_class.csv").mkdir()  # which no file can replace
    told: list[str] = []
    numbers = record(
        [("per_class", TABLE), ("top1", 5.0)],
        "val",
        7,
        writer=Recorder(),  # type: ignore[arg-type]
        folder=tmp_path,
        tell=told.append,
    )
    assert numbers == {"val/top1": 5.0}
    assert "val_per_class.csv was not written" in told[0]
