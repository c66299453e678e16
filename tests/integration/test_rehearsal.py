"""What the dry run tells of a world of two is what each of two real ranks takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import train
from routedvit.training.config.file import load_config
from routedvit.training.rehearsal import rehearse_memory
from tests.integration.launching import HERE, ROOT, run_script

SMALL = "model.kwargs.depth=2 model.kwargs.num_classes=10 train.batch_size=64"
SMALL += " train.micro_batch_size=16 schedule.warmup_epochs=0"
RUNS = [
    f"{SMALL} deepspeed.zero_optimization.stage={stage} {more}".strip()
    for stage, more in ((1, "precision.dtype=bf16"), (2, ""), (3, ""), (3, "train.batch_size=32"))
]


@pytest.mark.slow
def test_the_estimate_for_two_ranks_is_within_a_tenth_of_their_peaks(tmp_path: Path) -> None:
    run_script(HERE / "rehearsal_script.py", tmp_path, *RUNS)
    linear = nn.functional.linear
    for number, overrides in enumerate(RUNS):
        config = load_config(
            train.RunConfig, str(ROOT / "configs/quickstart.json"), overrides.split()
        )
        try:
            with rehearse_memory(config, 2) as rehearsal:
                estimate = rehearsal.measure(16).peak
        finally:
            nn.functional.linear = linear  # ZeRO-3 replaces it
        measured = [int((tmp_path / f"{number}_{rank}").read_text()) for rank in range(2)]
        assert measured == pytest.approx([estimate] * 2, rel=0.1), overrides
