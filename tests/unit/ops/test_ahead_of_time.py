"""Every kernel compiles for Ampere and Hopper without a GPU, and stays within their resources."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from triton.backends.nvidia import compiler  # noqa: F401 -- Triton built without NVIDIA cannot

from routedvit.ops.backend import KERNELS

ROOT = Path(__file__).resolve().parents[3]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may ask for


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """About 25 s on one slow core, or a moment where Triton's cache holds them."""
    done = subprocess.run(
        [sys.executable, "tests/unit/ops/compile_kernels.py"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_spills(compiled):
    assert [row for row in compiled if row["stack"] + row["local"] > 0] == []


def test_shared_memory_fits(compiled):
    assert [row for row in compiled if row["shared"] > SHARED_MEMORY[row["chip"]]] == []


def test_tokens_are_written_16_bytes_at_a_time(compiled):
    """Half of that is half of the bandwidth. The gradient of a gate is one number per row."""
    names = ("gather", "scatter", "add_rows", "router_logits_backward")
    tokens = [row for row in compiled if any(name in row["kernel"] for name in names)]
    assert len({row["kernel"] for row in tokens}) >= 6
    assert [row for row in tokens if row["stores"][0] < 128 or row["stores"][1] < 128] == []
    assert [row for row in tokens if sum(width < 128 for width in row["stores"]) > 1] == []


def test_every_kernel_is_among_them(compiled):
    written = {
        line.split("(")[0].removeprefix("def ")
        for file in (ROOT / "routedvit" / "ops").glob("*_triton.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert len(written) >= len(KERNELS)
    for chip in SHARED_MEMORY:
        assert {row["kernel"] for row in compiled if row["chip"] == chip} == written
