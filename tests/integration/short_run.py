"""The quickstart on a short leash, for tests of what starts it, stops it and starts it again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.integration.launching import ROOT


def short_run(folder: Path, steps: int) -> dict[str, Any]:
    """A config of `steps` small steps, each of them logged, on digits that are written below
    `folder`; without evaluation.
    """
    shards = folder / "shards"
    write = [sys.executable, "-m", "data.write", "--source", "mnist", "--out", shards]
    subprocess.run(write, cwd=ROOT, check=True, capture_output=True)
    run: dict[str, Any] = json.loads((ROOT / "configs" / "quickstart.json").read_text())
    run["data"]["train"]["shards"] = str(shards / "train")
    del run["data"]["val"]
    run["train"] = {"batch_size": 32, "steps": steps}
    run["model"]["kwargs"] |= {"depth": 2}
    run["schedule"]["warmup_epochs"] = 0
    run["log"]["every_steps"] = 1
    return run
