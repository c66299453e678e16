"""A machine with a GPU may have torch and Triton alone: then the trainer is left out, aloud.

All tests share a process, and some leave marks on it; see `untouched`.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import nn

TRAINER = ("deepspeed", "webdataset", "fsspec", "aiohttp", "simplejpeg")
MISSING = [name for name in TRAINER if find_spec(name) is None]

collect_ignore = ["test_fp16.py", "test_rehearsal.py"] if MISSING else []

# read once, with the first product of the process; for the test with deterministic algorithms
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_report_header() -> str | None:
    if not MISSING:
        return None
    return f"not installed: {', '.join(MISSING)}; left out: {', '.join(collect_ignore)}"


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """An engine allows TF32, ZeRO-3 replaces torch's linear: for the whole process, for good."""
    linear, environment = nn.functional.linear, dict(os.environ)
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = products.allow_tf32, convolutions.allow_tf32
    yield
    if not MISSING:
        from routedvit.training import engine

        engine.stop()
    nn.functional.linear = linear
    products.allow_tf32, convolutions.allow_tf32 = allowed
    os.environ.clear()
    os.environ.update(environment)
