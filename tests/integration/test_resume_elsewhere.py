"""`train.py`, preempted on two ranks, goes on on one or four: the same data, the same model.

And the uninterrupted run, evaluated offline on two ranks and on one, has the numbers it logged,
and its last checkpoint, exported, is the model that the run itself wrote at its end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import routedvit  # noqa: F401  (registers the models)
from tests.integration.launching import HERE, ROOT, run_script
from tests.unit.data.making import pair, vouch, write_tar

STEPS, STOP_AT = 6, 3
# 40 images in 4 shards: the third step ends an epoch and begins the next, the fifth one more.
FEW = "train/00000[0-3].tar"
# fp32 sums in another order, divided by Adam's root of small second moments in the first steps.
WEIGHT_TOLERANCE = 1e-5

CASES = [
    ("2", ["1"]),
    pytest.param(("2", ["1", "4"]), marks=pytest.mark.slow),
    pytest.param(("3", ["1", "4"]), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def runs(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Path, list[str]]:
    """The folder with all runs, and the numbers of ranks that went on."""
    out = tmp_path_factory.mktemp("resume")
    command = [sys.executable, "-m", "data.write", "--source", "mnist", "--out", str(out / "data")]
    command += ["--shard-size", "10"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    config = json.loads((ROOT / "configs" / "quickstart.json").read_text())
    config["data"]["train"]["shards"] = str(out / "data" / FEW)
    write_held_out(out / "held_out")
    val = {"shards": str(out / "held_out")}
    config["data"] |= {"val": val, "num_workers": 0, "log_samples": True}
    config["eval"] |= {"batch_size": 3, "knn": {}, "linear_probe": {"images_per_class": 2}}
    config["log"]["probe_images"] = 0
    config["train"] = {"batch_size": 16, "steps": STEPS}
    config["model"]["kwargs"]["depth"] = 1
    config["schedule"]["warmup_epochs"] = 0
    config["optim"]["eps"] = 1e-4
    config["ema"] = {"decay": 0.5}
    (out / "config.json").write_text(json.dumps(config))
    stage, ranks = request.param
    run_script(HERE / "resume_script.py", out / "config.json", out, stage, *ranks)
    return out, ranks


def write_held_out(folder: Path) -> None:
    """Eleven images, six for one rank and five for the other, that is two batches of three each."""
    folder.mkdir()
    sizes = {"0.tar": 7, "1.tar": 4}
    for name, size in sizes.items():
        members = [pair(f"{name[0]}_{i}", 10 * size + i, i % 3) for i in range(size)]
        write_tar(folder / name, [member for sample in members for member in sample])
    vouch(folder, sizes)


def seen(out: Path, name: str) -> list[list[str]]:
    """The keys of each step, of all ranks together. Where an epoch ends, one may come twice."""
    ranks = [path.read_text().splitlines() for path in sorted(out.glob(f"{name}.seen_*.jsonl"))]
    return [sorted(chain(*map(json.loads, lines))) for lines in zip(*ranks, strict=True)]


def test_a_signal_to_one_rank_stops_all_with_the_code_that_requeues(runs: Any) -> None:
    out, ranks = runs
    codes = json.loads((out / "codes.json").read_text())
    assert codes["stopped"] == [75, 75]
    assert codes["straight"] == [0, 0]
    for number in ranks:
        assert codes[f"on_{number}"] == [0] * int(number)
    # It came amid that step, and the ranks tell each other with the next.
    assert json.loads((out / "stopped" / "status.json").read_text())["step"] == STOP_AT + 1


def test_every_step_sees_the_samples_of_the_uninterrupted_run(runs: Any) -> None:
    out, ranks = runs
    straight, stopped = seen(out, "straight"), seen(out, "stopped")
    assert [len(keys) for keys in straight] == [16] * STEPS
    for number in ranks:
        assert stopped + seen(out, f"on_{number}") == straight


def test_the_model_is_that_of_the_uninterrupted_run(runs: Any) -> None:
    out, ranks = runs
    expected = load_file(out / "straight" / "weights" / "model.safetensors")
    for number in ranks:
        weights = load_file(out / f"on_{number}" / "weights" / "model.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=WEIGHT_TOLERANCE)


def test_every_sample_came_exactly_once_in_each_epoch(runs: Any) -> None:
    """As a user asks it: from the logs of both starts, on other numbers of ranks."""
    out, ranks = runs
    for number in ranks:
        command = [sys.executable, "-m", "data.audit", str(out / f"on_{number}")]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stdout + said.stderr
        for epoch in (0, 1):
            assert f"epoch {epoch}: 40 of 40 samples, each exactly once" in said.stdout
        assert f"{16 * STEPS} samples taken" in said.stdout


def test_offline_evaluation_gives_what_the_run_logged(runs: Any) -> None:
    straight = runs[0] / "straight"
    codes = json.loads((runs[0] / "codes.json").read_text())
    assert (codes["evaluated_on_2"], codes["evaluated_on_1"]) == ([0, 0], [0])
    checkpoint = f"step_{STEPS:08d}"
    state = json.loads((straight / "checkpoints" / checkpoint / "evaluation.json").read_text())
    logged = state["metrics"]
    on_2, on_1 = (
        json.loads((straight / "evaluated" / name / "report.json").read_text())["metrics"]
        for name in (checkpoint, f"{checkpoint}.1")
    )
    assert logged.keys() > {"val/top1", "val/top5", "val/loss", "val/class_top1", "val/knn_top1"}
    # Products of the same numbers may round differently: on one rank in other batches, and on two
    # since weights lie elsewhere in memory (in the run within ZeRO's flat buffers, offline alone).
    assert on_2 == pytest.approx(logged, rel=1e-6)
    assert on_1 == pytest.approx(logged, rel=1e-6)
    of_classes = (straight / "evaluation" / "val_per_class.csv").read_text()
    for name in (checkpoint, f"{checkpoint}.1"):
        assert (straight / "evaluated" / name / "val_per_class.csv").read_text() == of_classes


def test_an_exported_checkpoint_is_what_the_run_wrote_at_its_end(runs: Any) -> None:
    straight = runs[0] / "straight"
    assert json.loads((runs[0] / "codes.json").read_text())["exported_straight"] == [0]
    weights = []
    for suffix in ("", "_ema"):
        written = straight / f"weights{suffix}"
        exported = straight / "exported" / f"step_{STEPS:08d}{suffix}"
        assert {path.name for path in exported.iterdir()} == {"config.json", "model.safetensors"}
        for path in written.iterdir():
            assert (exported / path.name).read_bytes() == path.read_bytes()
        weights.append((exported / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]


def test_a_stopped_run_gives_a_model_too(runs: Any) -> None:
    stopped = runs[0] / "stopped"
    assert json.loads((runs[0] / "codes.json").read_text())["exported_stopped"] == [0]
    assert not (stopped / "weights").exists()
    exported = stopped / "exported" / f"step_{STOP_AT + 1:08d}"
    model = timm.create_model(f"local-dir:{exported}", pretrained=True)
    written = json.loads((runs[0] / "straight" / "weights" / "config.json").read_text())
    assert model.pretrained_cfg["mean"] == written["pretrained_cfg"]["mean"]
