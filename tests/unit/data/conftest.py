"""Fixtures: sets of shards, configs that read them, and a server of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data import check
from data.config import DataConfig, RemoteConfig
from tests.unit.data.making import Members, pair, vouch, write_tar
from tests.unit.data.serving import FaultyServer


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Path]:
    """make_set([5, 3], name='train') -> folder with shards of 5 and 3 samples and a manifest."""

    def make(sizes: list[int], name: str = "train") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        number, counts = 0, {}
        for shard, size in enumerate(sizes):
            members: Members = []
            for _ in range(size):
                members += pair(f"{name}/{number:04d}", number, number % 3)
                number += 1
            counts[f"{shard:03d}.tar"] = size
            write_tar(folder / f"{shard:03d}.tar", members)
        vouch(folder, counts)
        return folder

    return make


@pytest.fixture
def indexed(make_set: Callable[..., Path]) -> Callable[..., Path]:
    """indexed([5, 3]) -> such a set whose manifest names index files."""

    def make(sizes: list[int], name: str = "train") -> Path:
        folder = make_set(sizes, name)
        assert check.main(["--write-manifest", str(folder / "*.tar")]) == 0
        return folder

    return make


@pytest.fixture
def make_config() -> Callable[..., DataConfig]:
    """make_config(folder, num_workers=1, ...) -> a config with light augmentation."""

    def make(train: Path | str | list[dict], **fields: object) -> DataConfig:
        defaults = {"num_workers": 0, "shuffle_buffer": 8, "augment": {"mode": "light"}}
        section = train if isinstance(train, list) else {"shards": str(train)}
        return DataConfig.model_validate({"train": section} | defaults | fields)

    return make


@pytest.fixture
def server(tmp_path):
    """A server of the folder that `make_set` writes into."""
    with FaultyServer(tmp_path) as running:
        yield running
        running.shutdown()


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A cache of its own, and little patience."""
    monkeypatch.setattr("data.remote.MAX_PAUSE", 0.05)
    return RemoteConfig(cache_dir=str(tmp_path / "cache"), read_timeout=0.5, give_up_after=8)
