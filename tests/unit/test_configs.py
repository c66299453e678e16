"""The configs that ship with the project load, name real models, and match the schema file."""

import re
from pathlib import Path

import pytest
import timm
import torch

import train
from data.order import check_world, default_streams
from routedvit.training.config.file import describe_keys, json_schema, load_config
from routedvit.training.config.native import split_batch
from routedvit.training.config.native_keys import check_keys
from routedvit.training.config.run import ConfigError
from routedvit.training.run_folder import RunFolder, claim

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.json") if path.name != "schema.json")


def test_the_named_recipes_are_there() -> None:
    sizes = {f"vit_{size}{data}" for size in "sblh" for data in ("", "_in21k")}
    others = {"quickstart", "mae_b", "distill_s", "warm_start_b", "vit_b_512"}
    assert {path.stem for path in RECIPES} == sizes | others


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_says_what_it_costs(path: Path) -> None:
    config = load_config(train.RunConfig, str(path), [])
    assert config.name == path.stem
    assert all(config.about.model_dump().values()), "fill in every field of about"
    check_keys(config.deepspeed)
    split_batch(config.train.batch_size, config.train.micro_batch_size, world_size=2)
    with torch.device("meta"):
        timm.create_model(config.model.name, **config.model.kwargs)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_record_of_a_recipe_is_a_config(path: Path, tmp_path: Path) -> None:
    """It says every key, also those that this recipe does not read."""
    config = load_config(train.RunConfig, str(path), [])
    folder = RunFolder(tmp_path / "run")
    claim(folder, config.model_dump(mode="json"))
    assert load_config(train.RunConfig, str(folder.config), []) == config


SHARDS = {"imagenet1k": 1282, "imagenet21k": 14_200, "mnist": 16}  # as data.write makes them


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_starts_on_the_hardware_it_names(path: Path) -> None:
    config = load_config(train.RunConfig, str(path), [])
    named = re.match(r"(\d+) x ", config.about.hardware)
    ranks = int(named[1]) if named else 2  # CPU cores
    shards = SHARDS[config.data.train.shards.split("/")[1]]
    pairs = bool(config.loss.mixup or config.loss.cutmix)
    streams = config.data.streams or default_streams(shards)
    split_batch(config.train.batch_size, config.train.micro_batch_size, ranks)
    check_world(streams, config.train.batch_size, ranks, pairs)
    if config.model.name in ("colt5_vit_l", "colt5_vit_h"):  # what 64 GPUs are asked for
        check_world(streams, config.train.batch_size, 64, pairs)


def test_schema_is_fresh() -> None:
    assert (CONFIGS / "schema.json").read_text() == json_schema(train.RunConfig), "run: make schema"


def test_every_key_has_a_meaning() -> None:
    lines = describe_keys(train.RunConfig).splitlines()
    keys, meanings = lines[::2], lines[1::2]
    assert "  optim.lr = required" in keys
    assert "  data.train.shards = required" in keys
    assert {'  data.normalize = "dataset"', "  data.normalize.mean = required"} <= {*keys}
    without = [key for key, text in zip(keys, meanings, strict=True) if not text.strip()]
    assert not without


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('data.normalize={"mean":[0.1]}', "'data.normalize.std' is missing; add it"),
        ('data.normalize={"mean":["x"],"std":[1]}', 'data.normalize.mean = "x": input should be'),
        (
            'data.normalize={"maen":[1],"mean":[1],"std":[1]}',
            "unknown key 'data.normalize.maen' (did you mean 'mean'?)",
        ),
        ("data.normalize=modle", """data.normalize = "modle": input should be 'dataset' or"""),
        ("data.augment.color_jitter=strong", 'data.augment.color_jitter = "strong": input should'),
        (
            "data.augment.color_jitter=[0.1,0.2]",
            "data.augment.color_jitter = [0.1, 0.2]: value 3 is missing; add it",
        ),
        ("data.train.shards=[1]", "data.train.shards = 1: input should be a valid string"),
        ("data.train=x", 'data.train = "x": write an object, {...}'),
        ('data.train=[{"shard":"x"}]', "unknown key 'data.train.0.shard' (did you mean"),
    ],
)
def test_of_several_forms_the_mistake_is_told_of_the_one_that_was_meant(
    override: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(train.RunConfig, str(CONFIGS / "vit_b.json"), [override])
    assert f"--set: {said}" in str(caught.value)
