"""The rehearsed memory is the memory that a real run takes, and nothing is allocated for it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import train
from data.preview import Preview
from routedvit.training import engine as engines
from routedvit.training.assembly import build_engine
from routedvit.training.config.file import load_config
from routedvit.training.dry_run import Machine, describe_step, find_batch, rehearse
from routedvit.training.memory import MemoryMeter, storage_bytes
from routedvit.training.model import create_model
from routedvit.training.rehearsal import measure_compute, rehearse_memory

ROOT = Path(__file__).resolve().parents[3]
MICRO = 16
LOADER = SimpleNamespace(mean=(0.1,), std=(0.3,), samples_per_epoch=64)


def config_of(*overrides: str, name: str = "quickstart") -> Any:
    given = ["train.batch_size=32", f"train.micro_batch_size={MICRO}", "model.kwargs.depth=2"]
    config = load_config(
        train.RunConfig, str(ROOT / "configs" / f"{name}.json"), [*given, *overrides]
    )
    config.model.kwargs.setdefault("num_classes", 10)
    return config


@pytest.fixture(autouse=True)
def untouched() -> Any:
    """ZeRO-3 replaces torch's linear, and autocast leaves a mark, for the whole process."""
    linear, environment = nn.functional.linear, dict(os.environ)
    yield
    engines.stop()
    nn.functional.linear = linear
    os.environ.clear()
    os.environ.update(environment)


def measured_peak(config: Any) -> int:
    return measured(config)["peak"]


def measured(config: Any) -> dict[str, int]:
    """Bytes that a real second step takes in one process, under the names that a dry run prints."""
    world = engines.start()
    with MemoryMeter() as meter:
        model = create_model(config.model, num_classes=10, seed=0)
        engine, _ = build_engine(config, model, world, LOADER)  # type: ignore[arg-type]
        batch = {
            "image": torch.randn(MICRO, 1, 28, 28),
            "target": torch.zeros(MICRO, dtype=torch.int64),
            "position": torch.arange(MICRO),
        }
        for _ in range(2):
            meter.reset_peak()
            engine.train_step([batch] * engine.accumulation)
    engines.stop()
    state = engine.optimizer.state
    moments = [value for own in state.values() for value in own.values() if value.ndim]
    return {
        "weights": storage_bytes(model.parameters()),
        "master weights": storage_bytes(state),
        "optimiser state": storage_bytes(moments),
        "peak": meter.peak,
    }


@pytest.mark.parametrize(
    "overrides",
    [
        ("deepspeed.zero_optimization.stage=0",),
        ("deepspeed.zero_optimization.stage=0", "train.grad_checkpointing=true"),
        pytest.param(
            ("deepspeed.zero_optimization.stage=1", "precision.dtype=bf16"), marks=pytest.mark.slow
        ),
        ("deepspeed.zero_optimization.stage=2", "train.grad_checkpointing=heavy"),
        ("deepspeed.zero_optimization.stage=2", "precision.dtype=bf16", "precision.autocast=true"),
        ("deepspeed.zero_optimization.stage=3", "train.grad_checkpointing=block/2"),
        (
            "deepspeed.zero_optimization.stage=0",
            "model.kwargs.drop_path_rate=0.5",
            "model.kwargs.efficient_drop_path=true",
        ),
    ],
    ids=" ".join,
)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(overrides: tuple[str, ...]) -> None:
    config = config_of(*overrides)
    with rehearse_memory(config, 1) as rehearsal:
        estimate = rehearsal.measure(MICRO)
    nn.functional.linear = torch._C._nn.linear
    measured = measured_peak(config)
    assert estimate.peak == pytest.approx(measured, rel=0.1)
    parts = (estimate.weights, estimate.master, estimate.state)
    assert all(part < estimate.peak for part in parts)


def test_the_printed_numbers_are_those_of_a_run() -> None:
    config = config_of("precision.dtype=bf16", "deepspeed.zero_optimization.stage=1")
    text = describe_step(config, Machine(1, 80), Absent())
    found = measured(config)
    model = create_model(config.model, num_classes=10, seed=0)
    assert f"parameters   {sum(p.numel() for p in model.parameters()):,}\n" in text
    assert "batch        32 images = 1 rank x 16 x 2 accumulated\n" in text
    for name, size in found.items():
        printed = re.search(rf"^  {name} +([\d.]+) (MiB|GiB)", text, re.MULTILINE)
        assert printed, name
        assert printed[2] == "MiB"
        # what is printed has one decimal
        assert float(printed[1]) * 2**20 == pytest.approx(size, rel=0.1, abs=0.05 * 2**20), name


@pytest.mark.slow
def test_shards_shrink_with_the_world_and_activations_do_not() -> None:
    config = config_of("deepspeed.zero_optimization.stage=2", "train.batch_size=1024")
    found = {}
    for world_size in (2, 64):
        with rehearse_memory(config, world_size) as rehearsal:
            found[world_size] = rehearsal.measure(MICRO)
    assert found[64].weights == pytest.approx(found[2].weights, rel=0.02)
    assert found[64].state == pytest.approx(found[2].state / 32, rel=0.1)
    assert found[64].master == pytest.approx(found[2].master / 32, rel=0.1)


def test_every_policy_keeps_less_than_the_one_before_it() -> None:
    policies = (("none", 1), ("heavy", 1), ("block", 2), ("block", 1))
    compute = measure_compute(config_of(), 1, policies)
    sizes = [compute.activations[policy] for policy in policies]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.2 * sizes[0]
    assert compute.training_flops == pytest.approx(3 * compute.forward_flops, rel=0.05)


def test_images_that_efficient_drop_path_spares_cost_nothing() -> None:
    rate = ("model.kwargs.depth=3", "model.kwargs.drop_path_rate=0.5")
    plain = measure_compute(config_of(*rate), 1, (("none", 1),))
    config = config_of(*rate, "model.kwargs.efficient_drop_path=true")
    spared = measure_compute(config, 1, (("none", 1),))
    model = create_model(config.model, num_classes=10, seed=0)
    counted = model.flops(training=True).total  # type: ignore[operator]
    assert spared.forward_flops == pytest.approx(counted, rel=0.01)
    assert spared.forward_flops < 0.8 * plain.forward_flops
    assert spared.activations["none", 1] < 0.85 * plain.activations["none", 1]


def test_a_capacity_schedule_is_rehearsed_at_its_largest() -> None:
    every = [f"model.kwargs.{router}_capacity=0.5" for router in ("q", "kv", "ffn")]
    built = config_of(*every)
    scheduled = config_of(*every, "capacity.schedule=sample", "capacity.factors=[0.5,2]")
    heavy = config_of(*[text.replace("0.5", "1") for text in every])
    peaks = []
    for config in (built, scheduled, heavy):
        with rehearse_memory(config, 1) as rehearsal:
            peaks.append(rehearsal.measure(MICRO).peak)
    assert peaks[0] < peaks[1] == pytest.approx(peaks[2], rel=0.01)


def test_no_memory_is_taken_for_a_large_model() -> None:
    """Two blocks of colt5_vit_h have 50 million parameters: 200 MB, and as much for Adam twice."""
    config = config_of("model.kwargs.depth=2", name="vit_h")
    before = Path("/proc/self/statm").read_text().split()[1]
    with rehearse_memory(config, 1) as rehearsal:
        assert rehearsal.measure(MICRO).peak > 2**29
    after = Path("/proc/self/statm").read_text().split()[1]
    assert (int(after) - int(before)) * os.sysconf("SC_PAGE_SIZE") < 100 * 2**20


@pytest.mark.slow
def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    config = config_of("train.batch_size=64")
    with rehearse_memory(config_of("train.batch_size=64", "train.micro_batch_size=16"), 1) as run:
        needed = run.measure(16).peak
    text = find_batch(config, Machine(1, gpu_memory=1.01 * needed / 0.9 / 2**30))
    assert "train.micro_batch_size=16 " in text
    text = find_batch(config, Machine(1, gpu_memory=0.0001))
    assert text.startswith("no micro-batch fits")


class Absent:
    """Shards that are not there."""

    num_classes, samples_per_epoch, missing, evaluates = None, None, "no shard matches", True


def test_a_dry_run_goes_on_without_data() -> None:
    config = config_of()
    del config.model.kwargs["num_classes"]
    lines = list(rehearse(config, Absent(), Machine(2, 80), search=False))
    assert "a start would be refused: no shard matches" in lines[1]
    assert "1000 classes are assumed" in lines[1]
    assert "fits into 80 GiB" in lines[2]


def test_fp16_can_be_rehearsed_where_it_cannot_be_run() -> None:
    text = describe_step(config_of("precision.dtype=fp16"), Machine(2, 80), Absent())
    assert "fp16, whole" in text
    assert "fp32, this rank's share" in text


def test_storages_are_counted_once_and_taken_off_when_they_die() -> None:
    with MemoryMeter() as meter:
        x = torch.zeros(256)
        y = x.view(16, 16)
        assert meter.live == storage_bytes([x, y]) == 1024
        z = x + 1
        del z
        assert (meter.live, meter.peak) == (1024, 2048)
        del x, y
        assert meter.live == 0


RECIPES = sorted(path for path in (ROOT / "configs").glob("*.json") if path.stem != "schema")


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_the_gpus_it_names(path: Path) -> None:
    """Teachers and autoencoders too; no recipe needs its data, its weights or a GPU for it."""
    config = load_config(train.RunConfig, str(path), [])
    gpus = re.match(r"(\d+) x H100 80 GB", config.about.hardware)
    machine = Machine(int(gpus[1]) if gpus else 2, 80.0)
    text = "\n".join(rehearse(config, Preview(config.data), machine, search=False))
    assert ": fits into 80 GiB" in text
