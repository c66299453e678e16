"""A mistake a user can mend is one line that names it and the mend, exit code 2, no stack trace."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launching import HERE, ROOT, end, start

QUICKSTART = json.loads((ROOT / "configs" / "quickstart.json").read_text())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "mnist"
    command = [sys.executable, "-m", "data.write", "--source", "mnist", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def config(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart on a short leash, in a folder of its own."""
    folder = tmp_path_factory.mktemp("mistakes")
    run: dict[str, Any] = json.loads(json.dumps(QUICKSTART))
    run["data"]["train"]["shards"] = str(shards / "train")
    run["data"]["val"]["shards"] = str(shards / "val")
    run["output_dir"] = str(folder / "run")
    run["train"] = {"batch_size": 32, "steps": 2}
    run["schedule"]["warmup_epochs"] = 0
    run["optim"]["lr"] = 0.002
    run["eval"]["every_epochs"] = 100
    path = folder / "config.json"
    path.write_text(json.dumps(run))
    return path


def run_train(*commands: list[object]) -> list[tuple[int, str]]:
    """Exit code and output of `python train.py ...` for each list of arguments, in turn."""
    result = subprocess.run(
        [sys.executable, HERE / "fork_train.py"],
        input=json.dumps([[str(word) for word in command] for command in commands]),
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    return [(code, printed) for code, printed in json.loads(result.stdout)]


def assert_mistake(code: int, printed: str, *words: str) -> None:
    assert code == 2, printed
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.strip()]
    assert len(lines) == 1, printed
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


MISTAKES = {
    "optim.lrate=1": ["'optim.lrate'", "did you mean 'lr'"],
    'train.batch_size="many"': ["train.batch_size", '"many"', "valid integer"],
    "train.micro_batch_size=5": ["train.micro_batch_size = 5", "does not divide", "use 4"],
    "data.train.shards=nowhere/*.tar": ["nowhere/*.tar"],
    "model.name=colt5_vit_bb": ["'colt5_vit_bb'", "nearest", "colt5_vit_b"],
    "model.kwargs.img_sizes=28": ["model.kwargs", "img_sizes"],
    "deepspeed.train_batch_size=7": ["deepspeed.train_batch_size = 7", "train.batch_size"],
    "deepspeed.zero_optimisation={}": ["zero_optimisation", "did you mean"],
    "optim.name=adamv": ["optim.name", "adamv"],
    "schedule.warmup_epochs=1": ["schedule.warmup_epochs", "125 steps of a run of 2"],
    "checkpoint.best_metric=knn/top1": ["checkpoint.best_metric = 'knn/top1'", "there are: val"],
    'eval={"capacities":{}} objective.name=mae': ["eval.capacities", "delete it"],
}
# Found by a dry run too; tests/unit/training/test_dry_run.py has the others.
REHEARSED = ("data.val.shards=nowhere/*.tar", ["data.val.shards", "nowhere/*.tar"])


@pytest.fixture(scope="module")
def mistaken_runs(config: Path) -> dict[str, tuple[int, str]]:
    """What a start with each mistake ends in, and last what a dry run does."""
    starts = [arguments(config, overrides) for overrides in MISTAKES]
    results = run_train(*starts, [*arguments(config, REHEARSED[0]), "--dry-run"])
    return dict(zip([*MISTAKES, "dry run"], results, strict=True))


def arguments(config: Path, overrides: str) -> list[object]:
    """Command line of the run with these overrides, apart by spaces."""
    return ["--config", config, *(word for text in overrides.split() for word in ("--set", text))]


@pytest.mark.parametrize("override", MISTAKES)
def test_mistake_in_the_config(
    mistaken_runs: dict[str, tuple[int, str]], config: Path, override: str
) -> None:
    assert_mistake(*mistaken_runs[override], *MISTAKES[override])
    assert not (config.parent / "run").exists(), "a run that cannot start must not claim a folder"


def test_mistake_in_a_dry_run(mistaken_runs: dict[str, tuple[int, str]], config: Path) -> None:
    code, printed = mistaken_runs["dry run"]
    title, _, mistake = printed.partition("\n")
    assert "nothing is started" in title
    assert_mistake(code, mistake, *REHEARSED[1])
    assert not (config.parent / "run").exists()


def test_config_file_that_is_missing_or_no_json(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"name": "x",\n  "model": {,}\n}')
    missing = "configs/quickstrat.json"
    first, second = run_train(["--config", missing], ["--config", broken])
    assert_mistake(*first, "does not exist", "configs/quickstart.json")
    assert_mistake(*second, "line 2, column 13", "not JSON")


def test_folder_of_another_run(config: Path) -> None:
    changed = ["--config", config, "--set", "optim.lr=0.5"]
    first, other, again, fresh = run_train(
        ["--config", config], changed, ["--config", config], [*changed, "--fresh"]
    )
    assert first[0] == 0, first[1]
    assert_mistake(*other, "optim.lr was 0.002, is 0.5", "--fresh")
    assert again[0] == 0
    assert "already finished" in again[1]
    assert fresh[0] == 0
    assert "run.1" in fresh[1]


def test_the_other_order_of_samples_is_refused_and_not_said_the_run_keeps_its_own(
    config: Path, tmp_path: Path
) -> None:
    """The run is one from before there was data.shard_start: its record does not name it."""
    folder = tmp_path / "run"
    command = ["--config", config, "--set", f"output_dir={folder}"]
    command += ["--set", "data.log_samples=true", "--set", "checkpoint.every_steps=1"]
    (first,) = run_train([*command, "--set", "data.shard_start=null"])
    assert first[0] == 0, first[1]
    record = json.loads((folder / "config.json").read_text())
    del record["config"]["data"]["shard_start"]
    (folder / "config.json").write_text(json.dumps(record))
    other, again = run_train(
        [*command, "--set", 'data.shard_start="random"'],
        [*command, "--resume", "step_00000001"],
    )
    assert_mistake(*other, 'data.shard_start was null, is "random"', "--fresh")
    assert again[0] == 0, again[1]
    assert "data.shard_start is null, as the run began" in again[1]
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["data"]["shard_start"] is None
    audit = [sys.executable, "-m", "data.audit", folder]
    said = subprocess.run(audit, cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "64 samples taken, positions 0 to 63; 32 of them again" in said.stdout


def test_shards_that_changed_since_the_checkpoint(config: Path, tmp_path: Path) -> None:
    run = json.loads(config.read_text())
    shutil.copytree(run["data"]["train"]["shards"], tmp_path / "train")
    run["data"]["train"]["shards"] = str(tmp_path / "train")
    run["output_dir"] = str(tmp_path / "run")
    (tmp_path / "config.json").write_text(json.dumps(run))
    command = ["--config", tmp_path / "config.json"]
    (first,) = run_train(command)
    assert first[0] == 0, first[1]
    state = json.loads(next((tmp_path / "run").rglob("run_state.json")).read_text())
    assert state["held_out"].startswith("1,000 samples")
    manifest = json.loads((tmp_path / "train" / "manifest.json").read_text())
    manifest["shards"].reverse()
    (tmp_path / "train" / "manifest.json").write_text(json.dumps(manifest))
    other, fresh = run_train(command, [*command, "--fresh"])
    code, printed = other
    # the folder is open by the time that its checkpoint can tell
    opened, _, mistake = printed.partition("\n")
    assert opened.startswith("run folder")
    assert_mistake(code, mistake, "was run on 4,000 samples", "bring the earlier", "--fresh")
    assert fresh[0] == 0, fresh[1]


def test_under_the_launcher_one_rank_speaks(config: Path) -> None:
    process = start(ROOT / "train.py", "--config", config, "--set", "model.name=nope", quiet=True)
    try:
        printed, _ = process.communicate(timeout=120)
    finally:
        end(process)
    assert_mistake(process.returncode, printed, "'nope'")
