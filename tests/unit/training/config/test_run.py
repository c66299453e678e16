"""The run config refuses what it does not understand, in a line that names field and mend."""

import json
from pathlib import Path

import pytest

from routedvit.training.config.file import describe_keys, load_config
from routedvit.training.config.run import ConfigError, RunConfig
from routedvit.training.run_folder import RunFolder, claim

MINIMAL = {
    "name": "x",
    "model": {"name": "colt5_vit_test"},
    "train": {"batch_size": 8, "epochs": 2},
    "optim": {"lr": 0.001},
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(MINIMAL))
    return str(file)


def test_minimal_config_has_documented_defaults(path: str) -> None:
    config = load_config(RunConfig, path, [])
    assert config.folder == "runs/x"
    assert config.train.grad_clip == 1.0
    assert config.total_steps(samples_per_epoch=80) == 20


def test_the_record_in_a_run_folder_is_that_run_once_more(path: str, tmp_path: Path) -> None:
    config = load_config(RunConfig, path, ["optim.lr=0.5"])
    folder = RunFolder(tmp_path / "x")
    claim(folder, config.model_dump(mode="json"))
    assert load_config(RunConfig, str(folder.config), []) == config
    again = load_config(RunConfig, str(folder.config), ["name=again"])
    assert (again.name, again.optim.lr) == ("again", 0.5)


def test_a_section_that_a_record_says_is_off_can_be_switched_on(path: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "x")
    claim(folder, load_config(RunConfig, path, []).model_dump(mode="json"))
    config = load_config(RunConfig, str(folder.config), ["log.wandb.project=digits"])
    assert config.log.wandb is not None
    assert config.log.wandb.project == "digits"


def test_set_overrides_nested_keys_with_json_values(path: str) -> None:
    overrides = ["optim.betas=[0.9, 0.95]", "deepspeed.zero_optimization.stage=3", "name=other"]
    config = load_config(RunConfig, path, overrides)
    assert config.optim.betas == (0.9, 0.95)
    assert config.deepspeed == {"zero_optimization": {"stage": 3}}
    assert config.name == "other"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean 'lr'"]),
        ("optm.lr=1", ["optm", "did you mean 'optim'"]),
        ('optim.lr="fast"', ["optim.lr", '"fast"', "valid number"]),
        ("train.batch_size=2.5", ["train.batch_size", "2.5", "integer"]),
        ("train.batch_size=-1", ["train.batch_size", "greater than 0"]),
        ("train.steps=7", ["train.epochs and train.steps, null for the other (--set train.epochs"]),
        ("loss.name=hinge", ["loss.name", "'softmax' or 'bce'"]),
        ("train.epochs=Infinity", ["train.epochs = Infinity: input should be a finite number"]),
        ("optim.lr=1e999", ["optim.lr = Infinity: input should be a finite number"]),
        ("schedule.min_lr=NaN", ["schedule.min_lr = NaN: input should be a finite number"]),
        ("optim.betas=[0.9, Infinity]", ["optim.betas = Infinity: input should be a finite"]),
        (f"seed={1 << 64}", [f"seed = {1 << 64}: input should be less than {1 << 64}"]),
        ("name=..", ['name: ".." cannot name a run and its folder; write letters, digits and']),
        ("name=-x", ['name: "-x" cannot name', "behind the first of them also '.' and '-'"]),
        ("name=a/b", ['name: "a/b" cannot name a run']),
        ('name="a\\n"', [r'name: "a\n" cannot name a run']),
        ("name=", ['name: "" cannot name a run']),
        ("name=null", ["--set: name = null: input should be a valid string"]),
        ("optim.lr=abc", ['--set: optim.lr = "abc": input should be a valid number']),
        ("train.compile=True", ['--set: train.compile = "True": write true or false']),
        ("optm.lr=1", ["run.json with --set optm.lr=1: unknown key 'optm'"]),
        ("train.steps=7", ["run.json with --set train.steps=7: train: give exactly one"]),
        ("optim..lr=1", ["--set optim..lr=1: write it as section.key=value"]),
        (".lr=1", ["--set .lr=1: write it as section.key=value"]),
        ("checkpoint.best_metric=top1", ['best_metric: "top1" is no evaluated', "as val/top1"]),
        ("log.profile_steps=[1]", ["log.profile_steps = [1]: value 2 is missing; add it"]),
        ("optim.betas=1", ["optim.betas = 1: write a list, [A, B, ...]"]),
        ("train.grad_clip=no", ['train.grad_clip = "no": input should be a valid number']),
        ("optim.lr", ["--set optim.lr", "section.key=value"]),
        ("name.x=1", ["--set name.x: 'name' is a value, not a section"]),
        (
            "objective.name=mea",
            ["objective.name = \"mea\": input should be one of 'supervised', 'mae', 'distill'"],
        ),
        ("objective.mask_ratio=0.5", ["'objective.name' is missing"]),
        ('objective={"name": "mae", "mask_ratoi": 1}', ["objective.mask_ratoi", "'mask_ratio'"]),
        ('objective={"name": "mae", "mask_ratio": 2}', ["objective.mask_ratio = 2: input should"]),
        ('objective={"name": "mae", "decoder_heads": 7}', ["decoder_heads = 7 must divide"]),
        ('objective={"name": "distill"}', ["'objective.teacher' is missing"]),
        (
            'objective={"name": "distill", "teacher": {"nam": "x"}}',
            ["unknown key 'objective.teacher.nam' (did you mean 'name'?)", "(and 1 more)"],
        ),
    ],
)
def test_mistake_names_field_and_mend(path: str, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, path, [override])
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize("name", ["x", "_", "7.b-2", "größe", "a..b"])
def test_names_that_a_folder_can_have(path: str, name: str) -> None:
    overrides = [f'name="{name}"', f"seed={(1 << 64) - 1}"]
    assert load_config(RunConfig, path, overrides).folder == f"runs/{name}"


def test_digits_typed_for_a_name_are_one(path: str) -> None:
    config = load_config(RunConfig, path, ["name=2024", "output_dir=1e3", "seed=7"])
    assert (config.name, config.output_dir, config.seed) == ("2024", "1e3", 7)


def test_a_mistake_of_the_file_is_told_of_the_file(path: str) -> None:
    Path(path).write_text(json.dumps(MINIMAL | {"name": 7}))
    with pytest.raises(ConfigError, match=r"run\.json: name = 7: input should be a valid string$"):
        load_config(RunConfig, path, ["optim.lr=1"])


def test_missing_required_key_is_named(path: str) -> None:
    Path(path).write_text(json.dumps(MINIMAL | {"optim": {}}))
    with pytest.raises(ConfigError, match=r"'optim.lr' is missing"):
        load_config(RunConfig, path, [])


def test_missing_file_lists_its_neighbours(path: str) -> None:
    with pytest.raises(ConfigError, match=r"does not exist; there are .*run\.json"):
        load_config(RunConfig, path.replace("run.json", "runs.json"), [])


def test_a_folder_is_told_what_it_holds(path: str) -> None:
    with pytest.raises(ConfigError, match=r"is a folder; there are .*run\.json"):
        load_config(RunConfig, str(Path(path).parent), [])
    Path(path).rename(Path(path).with_name("config.json"))
    with pytest.raises(ConfigError, match=r"is a folder; name .*config\.json$"):
        load_config(RunConfig, str(Path(path).parent), [])


def test_broken_json_is_located_by_line_and_column(path: str) -> None:
    Path(path).write_text('{"name": "x",\n "model" {}}')
    with pytest.raises(ConfigError, match="line 2, column 10: not JSON"):
        load_config(RunConfig, path, [])


def test_json_that_is_no_object_is_refused(path: str) -> None:
    Path(path).write_text("[1, 2]")
    with pytest.raises(ConfigError, match="holds a JSON list"):
        load_config(RunConfig, path, [])


def test_every_objective_lists_its_keys() -> None:
    text = describe_keys(RunConfig)
    for name in ("supervised", "mae", "distill"):
        assert f'  objective.name = "{name}"' in text
    assert "  objective.mask_ratio = 0.75" in text
    assert "  objective.teacher.name = required" in text


@pytest.mark.parametrize(
    ("value", "policy"),
    [
        ("false", ("none", 1)),
        ("true", ("block", 1)),
        ("heavy", ("heavy", 1)),
        ("block/3", ("block", 3)),
    ],
)
def test_checkpointing_is_a_policy_or_a_boolean(
    path: str, value: str, policy: tuple[str, int]
) -> None:
    config = load_config(RunConfig, path, [f"train.grad_checkpointing={value}"])
    assert config.train.checkpointing == policy


def test_an_unknown_checkpointing_policy_is_refused(path: str) -> None:
    said = "is no policy; write true, false, heavy, block, or block/2 (or heavy/2)"
    for value, shown in (("blocks", '"blocks"'), ("block/0", '"block/0"'), ("1", "1")):
        with pytest.raises(ConfigError) as caught:
            load_config(RunConfig, path, [f"train.grad_checkpointing={value}"])
        assert f"train.grad_checkpointing: {shown} {said}" in str(caught.value)
        assert "more)" not in str(caught.value)


def test_mixing_for_an_objective_without_labels_is_refused(path: str) -> None:
    overrides = ["objective.name=mae", "loss.cutmix=0.5", "seed=3"]
    given = r"--set objective\.name=mae --set loss\.cutmix=0\.5"
    with pytest.raises(ConfigError, match=rf"with {given}: loss\.cutmix: objective.*no labels"):
        load_config(RunConfig, path, overrides)
