"""What a ledger says survives the death of the process that wrote it."""

from __future__ import annotations

import json

import pytest
import torch

from data.errors import DataError
from data.ledger import Ledger

BAD = {"shard": "0.tar", "key": "a", "reason": "none", "position": 3}
BATCH = {"position": torch.tensor([1, 2]), "key": ["b", "c"]}


@pytest.mark.parametrize("name", ["bad_samples.train", "samples"])
def test_half_a_line_of_a_killed_process_costs_no_other(tmp_path, name):
    path = tmp_path / f"{name}.rank0.jsonl"

    def write() -> None:
        ledger = Ledger(tmp_path, "train", rank=0, limit=9, log_samples=True)
        ledger.record([BAD])
        ledger.took(BATCH)

    write()
    (line,) = path.read_text().splitlines()
    path.write_text(f"{line}\n{line[:9]}")
    write()
    assert path.read_text().splitlines() == [line, line[:9], line]
    assert json.loads(line)["position"] in (3, [1, 2])


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, caplog):
    (tmp_path / "logs").write_text("no folder can be made here")
    ledger = Ledger(tmp_path / "logs", "train", rank=0, limit=1, log_samples=True)
    for _ in range(2):
        ledger.record([BAD])
        ledger.took(BATCH)
    assert caplog.text.count("lacks lines from here on") == 2  # once a file
    with pytest.raises(DataError, match="2 bad train samples"):
        ledger.record([{**BAD, "key": "b"}])
