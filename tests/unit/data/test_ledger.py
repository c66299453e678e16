"""What a ledger says survives the death of the process that wrote it."""

from __future__ import annotations

import json

import pytest
import torch

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
