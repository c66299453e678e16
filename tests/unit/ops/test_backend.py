"""The backend is chosen once, says why, and never silently differs from what was asked."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from routedvit.ops import gather_tokens
from routedvit.ops.backend import (
    VARIABLE,
    backend,
    plain_pytorch,
    set_backend,
    uses_triton,
)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (VARIABLE, "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    yield
    monkeypatch.undo()
    set_backend(None)


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_auto_is_torch_without_a_gpu_even_where_the_interpreter_could_run(monkeypatch, caplog):
    without_gpu(monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with caplog.at_level(logging.INFO, "routedvit"):
        assert set_backend(None) == "torch"
        backend()
    assert caplog.messages == ["backend torch (asked for: auto): no CUDA device"]


def test_variable_is_read_and_argument_goes_before_it(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(VARIABLE, "triton")
    assert set_backend(None) == "triton"
    assert set_backend("torch") == "torch"


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_triton_where_it_cannot_run_is_an_error(by, monkeypatch):
    without_gpu(monkeypatch)
    if by == "variable":
        monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match=r"backend='triton' .* cannot run here: no CUDA device"):
        set_backend("triton" if by == "argument" else None)


def test_triton_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        set_backend("triton")
    assert set_backend("auto") == "torch"


def test_triton_on_a_tensor_that_is_elsewhere_is_an_error(monkeypatch):
    monkeypatch.setattr("routedvit.ops.backend._obstacle", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    set_backend("triton")
    with pytest.raises(ValueError, match="cannot run on a tensor on cpu"):
        uses_triton(torch.zeros(1))
    assert not uses_triton(torch.zeros(1, dtype=torch.float64))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert set_backend("auto") == "triton"
    assert not uses_triton(torch.zeros(1))


def test_fake_tensors_of_a_rehearsal_neither_choose_nor_are_refused(monkeypatch):
    monkeypatch.setattr("routedvit.ops.backend._resolved", None)
    with FakeTensorMode():
        fake = torch.zeros(1)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for name in ("auto", "triton"):
            monkeypatch.setenv(VARIABLE, name)
            assert not uses_triton(fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr("routedvit.ops.backend._obstacle", lambda: None)
    assert backend() == "triton"  # not what a rehearsal left behind


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"backend='cuda' .* choose one of auto, torch, triton"):
        set_backend("cuda")


class OneIfExported(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if plain_pytorch() else x


def test_an_export_is_told_from_a_compiled_function():
    """Dynamo of torch 2.11 takes torch.compiler.is_exporting() for True in both."""
    model, zero = OneIfExported(), torch.zeros(1)
    assert model(zero).item() == 0
    assert torch.compile(model, fullgraph=True, backend="eager")(zero).item() == 0
    for strict in (True, False):
        assert torch.export.export(model, (zero,), strict=strict).module()(zero).item() == 1
    assert torch.jit.trace(model, zero)(zero).item() == 1


def test_transforms_are_given_plain_pytorch_also_when_they_are_compiled():
    seen = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(plain_pytorch())
        return gather_tokens(x, torch.zeros(1, 1, dtype=torch.long)).square().sum()

    x = torch.ones(1, 1, 1)
    for function in (
        watched,
        torch.func.grad(watched),
        lambda x: torch.func.vmap(watched)(x[None]),
    ):
        function(x)
    with torch.autograd.forward_ad.dual_level():
        watched(x)
    watched(x)
    assert seen == [False, True, True, True, False]
    compiled = torch.compile(torch.func.vmap(watched), backend="eager", fullgraph=True)
    assert compiled(x[None]).item() == 1
