"""Where the kernels under test run: in the interpreter, and under `pytest -m gpu` on the GPU."""

from collections.abc import Iterator

import pytest
import torch

from routedvit.ops import set_backend

HAS_GPU = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="`pytest -m gpu` runs it")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device on which the Triton backend is chosen for the length of the test."""
    if request.param == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    set_backend("triton")
    yield request.param
    set_backend(None)
