"""Batches are sent off one ahead, and what computes waits for its own copy only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from routedvit.training.ahead import Ahead

FAKE_GPU = torch.device("meta")  # a device to copy to that is no CPU


class Streams:
    """A device's streams, and what was asked of them in what order."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.now = "computing"

    def Stream(self) -> str:
        return "copying"

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        self.now = stream
        yield
        self.now = "computing"

    def current_stream(self) -> Streams:
        return self

    def wait_stream(self, stream: str) -> None:
        self.said.append("wait for copies")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    streams = Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    to = torch.Tensor.to

    def copy(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        assert streams.now == "copying"
        assert options["non_blocking"]
        streams.said.append(f"copy {int(tensor[0])}")
        return to(tensor, *args, **options)

    def keep(tensor: torch.Tensor, stream: Streams) -> None:
        assert stream is streams
        streams.said.append("keep")

    monkeypatch.setattr(torch.Tensor, "to", copy)
    monkeypatch.setattr(torch.Tensor, "record_stream", keep)
    return streams


def batches(number: int) -> Iterator[dict[str, Any]]:
    return ({"image": torch.tensor([i]), "key": [str(i)]} for i in range(number))


@pytest.mark.parametrize("number", [0, 1, 3])
def test_the_next_is_on_its_way_while_one_is_worked_on(number, streams):
    for i, batch in enumerate(Ahead(FAKE_GPU)(batches(number))):
        assert batch["key"] == [str(i)]
        assert batch["image"].device == FAKE_GPU
        streams.said.append(f"compute {i}")
    expected = ["copy 0"] if number else []
    for i in range(number):
        following = [f"copy {i + 1}"] if i + 1 < number else []
        expected += ["wait for copies", "keep", *following, f"compute {i}"]
    assert streams.said == expected


def test_what_is_there_already_waits_for_no_copy(streams):
    given = [{"image": torch.zeros(1, device=FAKE_GPU), "key": ["a"]}] * 2
    assert [batch is given[0] for batch in Ahead(FAKE_GPU)(given)] == [True, True]
    assert streams.said == []


def test_on_a_cpu_batches_stay_as_they_are():
    given = list(batches(3))
    asked: list[int] = []

    def counted() -> Iterator[dict[str, Any]]:
        for i, batch in enumerate(given):
            asked.append(i)
            yield batch

    for i, batch in enumerate(Ahead(torch.device("cpu"))(counted())):
        assert batch is given[i]
        assert asked == list(range(i + 1))
