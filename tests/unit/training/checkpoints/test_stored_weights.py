"""Weights on disk: found or refused in words, named by where they lie, put together from shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from routedvit.training.checkpoints.full_weights import full_weights, has_state
from routedvit.training.checkpoints.stored_weights import find, title, weights_in
from routedvit.training.config.run import ConfigError
from routedvit.training.run_folder import RunFolder


@pytest.mark.parametrize(
    ("named", "complaint"),
    [
        ("latest", "there is no checkpoint in"),
        ("nowhere", "no such file or folder"),
        (".", "not a whole checkpoint"),
    ],
)
def test_a_checkpoint_that_is_not_there(named: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        find(named if named == "latest" else str(tmp_path / named), RunFolder(tmp_path))


def shards(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of two ranks that hold a half of `model.w` each, and averages on the first."""
    whole = torch.arange(6.0).view(2, 3)
    (folder / "shards").mkdir(parents=True)
    for rank in range(2):
        holder = {"part": 0, "elementwise": {"ema": "float32"} if rank == 0 else {}}
        pieces = [["model.w", [2, 3], 3 * rank, 3, 0, 1]]  # after one element of something else
        table = {"holders": [holder], "pieces": pieces}
        (folder / "shards" / f"rank_{rank:05d}.json").write_text(json.dumps(table))
        flat = torch.cat([torch.tensor([-1.0]), whole.view(-1)[3 * rank : 3 * rank + 3]])
        save_file(
            {"0/weight": flat, "0/ema": flat + 10},
            folder / f"shards/rank_{rank:05d}_00.safetensors",
        )
    save_file({"model.buffer": torch.ones(1)}, folder / "shards" / "replicated.safetensors")
    return {"model.w": whole, "model.buffer": torch.ones(1)}


def test_parameters_are_put_together_from_all_ranks(tmp_path: Path) -> None:
    expected = shards(tmp_path)
    found = full_weights(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_file_is_opened_once_however_many_pieces_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = shards(tmp_path)
    for path in tmp_path.rglob("rank_*.json"):
        table = json.loads(path.read_text())
        [[name, shape, start, _, number, offset]] = table["pieces"]
        table["pieces"] = [[name, shape, start + i, 1, number, offset + i] for i in range(3)]
        path.write_text(json.dumps(table))
    opened: list[str] = []

    def noting(path: Path, **options: Any) -> Any:
        opened.append(path.name)
        return safe_open(path, **options)

    monkeypatch.setattr("routedvit.training.checkpoints.full_weights.safe_open", noting)
    assert torch.equal(full_weights(tmp_path)["model.w"], expected["model.w"])
    assert opened == ["rank_00000_00.safetensors", "rank_00001_00.safetensors"]


def test_averages_are_evaluated_beside_the_weights(tmp_path: Path) -> None:
    expected = shards(tmp_path)
    assert has_state(tmp_path, "ema")
    assert not has_state(tmp_path, "exp_avg")
    (raw, weights), (averaged, averages) = weights_in(tmp_path)
    assert (raw, averaged) == ("", "_ema")
    assert torch.equal(weights["model.w"], expected["model.w"])
    assert torch.equal(
        averages["model.w"][0], expected["model.w"][0] + 10
    )  # the first rank had an average
    assert torch.equal(averages["model.w"][1], expected["model.w"][1])


@pytest.mark.parametrize(
    ("wanted", "suffixes"), [("both", ["", "_ema"]), ("raw", [""]), ("ema", ["_ema"])]
)
def test_the_weights_that_the_run_evaluates_are_evaluated(
    wanted: str, suffixes: list[str], tmp_path: Path
) -> None:
    shards(tmp_path)
    assert [suffix for suffix, _ in weights_in(tmp_path, wanted)] == suffixes


def test_weights_are_named_by_where_they_lie(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    expected = {
        run / "checkpoints" / "step_00000005": "step_00000005",
        run / "weights" / "model.safetensors": "weights",
        run / "weights_ema" / "model.safetensors": "weights_ema",
        other / "checkpoints" / "step_00000005": "other.step_00000005",
        other / "weights" / "model.safetensors": "other.weights",
        other / "dense.v2.safetensors": "other.dense.v2",
    }
    for path in expected:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if path.suffix else path.mkdir()
    assert {path: title(path, RunFolder(run)) for path in expected} == expected


def test_a_checkpoint_on_a_linked_disk_is_the_runs_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "scratch" / "step_00000005").mkdir(parents=True)
    folder.path.mkdir()
    folder.checkpoints.symlink_to(tmp_path / "scratch")
    assert title(folder.checkpoints / "step_00000005", folder) == "step_00000005"


def test_a_latest_that_cannot_be_read_is_told_with_a_way_round(tmp_path: Path) -> None:
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.parent.mkdir()
    pointer.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"latest cannot be read .* name a folder"):
        find("latest", RunFolder(tmp_path))
