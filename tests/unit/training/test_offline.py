"""`--evaluate`: weights from anywhere, the same numbers as in training, mistakes in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import distributed, nn

import routedvit  # noqa: F401  (registers the models)
from routedvit.training.config import ConfigError, RunConfig
from routedvit.training.console import Console
from routedvit.training.evaluators import Classification
from routedvit.training.full_weights import full_weights, has_state
from routedvit.training.interfaces import EvalLoaders
from routedvit.training.offline import evaluate_offline, find, of_network, weights_in
from routedvit.training.run_folder import RunFolder
from routedvit.training.world import World

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


class Loader:
    num_samples = 6

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        yield {
            "image": torch.randn(6, 3, 64, 64, generator=generator),
            "target": torch.randint(0, 5, (6,), generator=generator),
            "valid": torch.ones(6, dtype=torch.bool),
        }


def model(seed: int, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    kwargs = {"img_size": 64, "depth": 1, "num_classes": 5} | kwargs
    return timm.create_model("colt5_vit_test", **kwargs)


def config(**sections: Any) -> RunConfig:
    sections = {"model": {"name": "colt5_vit_test"}, "optim": {"lr": 0.1}} | sections
    return RunConfig.model_validate(
        {"name": "x", "train": {"batch_size": 2, "steps": 1}, **sections}
    )


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def evaluate(path: Path | str, folder: Path, **sections: Any) -> dict[str, float]:
    code = evaluate_offline(
        config(**sections), model(1), WORLD, EvalLoaders(Loader(), None),
        checkpoint=str(path), folder=RunFolder(folder), console=Console(1),
    )  # fmt: skip
    assert code == 0
    (report,) = (folder / "evaluation").glob("*.json")
    return json.loads(report.read_text())["metrics"]


@pytest.mark.usefixtures("_one_process")
def test_exported_weights_give_their_own_numbers(tmp_path: Path) -> None:
    trained = model(0)
    (tmp_path / "weights").mkdir()
    save_file(trained.state_dict(), tmp_path / "weights" / "model.safetensors")
    numbers = evaluate(tmp_path / "weights", tmp_path / "run", eval={"capacities": {}})
    expected = dict(Classification(Loader(), every_steps=0).run(trained))
    assert numbers["val/loss"] == pytest.approx(expected["loss"])
    assert "val/capacity_0.5/top1" in numbers
    assert (tmp_path / "run" / "evaluation" / "val_capacities.csv").exists()


@pytest.mark.usefixtures("_one_process")
def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file(model(0, depth=2).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other\.safetensors does not fit the model"):
        evaluate(tmp_path / "other.safetensors", tmp_path / "run")


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


def test_averages_are_evaluated_beside_the_weights(tmp_path: Path) -> None:
    expected = of_network(shards(tmp_path))
    assert has_state(tmp_path, "ema")
    assert not has_state(tmp_path, "exp_avg")
    (raw, weights), (averaged, averages) = weights_in(tmp_path)
    assert (raw, averaged) == ("", "_ema")
    assert torch.equal(weights["w"], expected["w"])
    assert torch.equal(averages["w"][0], expected["w"][0] + 10)  # the first rank had an average
    assert torch.equal(averages["w"][1], expected["w"][1])


def test_a_latest_that_cannot_be_read_is_told_with_a_way_round(tmp_path):
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.parent.mkdir()
    pointer.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"latest cannot be read .* name a folder"):
        find("latest", RunFolder(tmp_path))
