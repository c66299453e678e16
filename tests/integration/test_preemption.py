"""`deepspeed train.py` is stopped in the middle, started again, and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3fs

from tests.integration.launching import ROOT, end, launch, start
from tests.unit.data.test_stores import free_port, running

STEPS = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory: Any) -> Path:
    """The quickstart, shorter, on shards of its own."""
    folder = tmp_path_factory.mktemp("preemption")
    command = [sys.executable, "-m", "data.write", "--source", "mnist", "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    run = json.loads((ROOT / "configs" / "quickstart.json").read_text())
    run["data"]["train"]["shards"] = str(folder / "train")
    run["data"]["val"]["shards"] = str(folder / "val")
    run["train"] = {"batch_size": 32, "steps": STEPS}
    run["model"]["kwargs"] |= {"depth": 2, "proj_drop_rate": 0.1}
    run["schedule"]["warmup_epochs"] = 0.1
    run["log"]["every_steps"] = 5
    path = folder / "config.json"
    path.write_text(json.dumps(run))
    return path


def arguments(config: Path, folder: Path) -> tuple[Any, ...]:
    return ROOT / "train.py", "--config", config, "--set", f"output_dir={folder}"


@pytest.fixture(scope="module")
def straight(config: Path) -> bytes:
    """Exported weights of a run that nobody disturbed, under another launcher besides."""
    folder = config.parent / "straight"
    launch(*arguments(config, folder), torchrun=True)
    return (folder / "weights" / "model.safetensors").read_bytes()


def kill_the_typed_command(process: subprocess.Popen[str]) -> None:
    """SIGTERM to `deepspeed` itself, which dies of it without telling its ranks."""
    process.terminate()


def interrupt_from_the_keyboard(process: subprocess.Popen[str]) -> None:
    """Ctrl-C reaches every process of the terminal's foreground group."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize("stop", [kill_the_typed_command, interrupt_from_the_keyboard])
def test_a_stopped_run_saves_goes_on_and_loses_nothing(
    config: Path, straight: bytes, stop: Callable[[subprocess.Popen[str]], None]
) -> None:
    folder = config.parent / stop.__name__
    process = start(*arguments(config, folder))
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                break
        stop(process)
        printed = process.stdout.read()  # ends when the last rank has ended
        process.wait(timeout=30)
    finally:
        end(process)
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "stopped", printed
    assert 0 < status["step"] < STEPS
    assert (folder / "checkpoints" / f"step_{status['step']:08d}").is_dir()

    launch(*arguments(config, folder))
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    assert (folder / "weights" / "model.safetensors").read_bytes() == straight


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_go_on_from_the_newest_checkpoint(
    config: Path, straight: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    folder = config.parent / "restarted"
    often = ("--set", "checkpoint.every_steps=10")
    process = start(*arguments(config, folder), *often, restarts=1)
    try:
        assert process.stdout is not None
        while not (folder / "checkpoints" / "latest").exists():
            assert process.stdout.readline(), "ended before a checkpoint"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [p for p in children if b"train.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
        assert len(ranks) == 2
        os.kill(int(ranks[1]), signal.SIGKILL)
        printed = process.stdout.read()
        assert process.wait(timeout=30) == 0, printed
    finally:
        end(process)
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    assert (folder / "weights" / "model.safetensors").read_bytes() == straight


def test_a_run_whose_machine_is_lost_with_its_disk_goes_on_from_its_copy_in_a_bucket(
    config: Path, straight: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, folder = free_port(), config.parent / "copied"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    command = *arguments(config, folder), "--set", "checkpoint.mirror=s3://runs/all"
    with running(port, "moto.server", "-p", str(port)):
        bucket = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        bucket.mkdir("runs")
        process = start(*command, "--set", "checkpoint.every_steps=10")
        try:
            assert process.stdout is not None
            while not bucket.glob("runs/all/copied/checkpoints/step_*/manifest.json"):
                assert process.stdout.readline(), "ended before a copy"
        finally:
            end(process)
        shutil.rmtree(folder)
        printed = launch(*command)
        assert "had no checkpoint; step_" in printed
        assert re.search(r"copy +s3://runs/all/copied\n", printed)
        assert (folder / "weights" / "model.safetensors").read_bytes() == straight
        copy = "runs/all/copied"
        assert bucket.cat_file(f"{copy}/weights/model.safetensors") == straight
        assert json.loads(bucket.cat_file(f"{copy}/status.json"))["status"] == "finished"
        assert bucket.exists(f"{copy}/checkpoints/step_{STEPS:08d}/manifest.json")
