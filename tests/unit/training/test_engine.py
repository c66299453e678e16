"""The engine as one process: mistakes in words, evaluation leaves no trace, a quick start.

What needs several ranks or ZeRO-3 is in tests/integration/test_engine_stages.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from routedvit.training.config.native import resolve_native_config
from routedvit.training.config.run import ConfigError
from routedvit.training.engine import Engine
from routedvit.training.objectives import SupervisedObjective, build_loss
from routedvit.training.recipe.optim import build_optimizer


def test_what_one_rank_cannot_load_all_refuse_before_they_share_weights(tmp_path, monkeypatch):
    """The fault is another rank's: this one would go on to wait for it."""

    class OneOfTwo:
        rank, _layout = 0, None

        def gather(self, value: str | None) -> list[str | None]:
            return [value, "rank 1: cannot be loaded under this ZeRO stage"]

    monkeypatch.setattr("routedvit.training.engine.state.load_shards", lambda *arguments: None)
    with pytest.raises(ConfigError, match="rank 1: cannot be loaded"):
        Engine.load_state(OneOfTwo(), tmp_path)


def make(world, user, dtype="fp32", **loss):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    native = resolve_native_config(
        user,
        batch_size=4,
        micro_batch_size=2,
        world_size=1,
        grad_clip=1.0,
        dtype=dtype,
        num_parameters=100_000,
    )
    objective = SupervisedObjective(model, build_loss("softmax"))
    optimizer = build_optimizer(model, name="adamw", lr=1e-3, weight_decay=0.1)
    return Engine(world, objective, optimizer, native)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def engine(world, request):
    return make(world, {"zero_optimization": {"stage": 1}}, request.param)


def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randn(2, 3, 32, 32, generator=generator),
            "target": torch.tensor([0, 2]),
            "position": torch.arange(2),
        }
        for _ in range(2)
    ]


def test_plain_python_is_a_world_of_one(world):
    assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")


def test_a_step_learns_and_tells(engine):
    results = [engine.train_step(batches()) for _ in range(5)]
    assert results[-1].loss < results[0].loss
    assert results[0].grad_norm > 0
    assert 0 <= results[0].metrics["top1"] <= 100
    assert not any(result.skipped or result.stop for result in results)


def test_images_that_come_as_bytes_are_normalised(engine):
    scale, shift = torch.rand(2, 3, 1, 1) / 50 + 0.01
    levels = torch.randint(256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    in_bytes = [b | {"scale": scale, "shift": shift} for b in batches()]
    in_bytes = [b | {"image": image} for b, image in zip(in_bytes, levels, strict=True)]
    with torch.no_grad(), engine.evaluating() as model:
        logits = [model(image * scale - shift).float() for image in levels]
    targets = [b["target"] for b in in_bytes]
    losses = [nn.functional.cross_entropy(*pair) for pair in zip(logits, targets, strict=True)]
    loss = engine.train_step(in_bytes).loss
    assert loss == pytest.approx(float(sum(losses)) / 2, rel=1e-2)


def test_a_wish_to_stop_comes_back(engine):
    assert engine.train_step(batches(), stop=True).stop


def test_a_step_that_is_not_finite_changes_nothing(engine):
    before = {name: value.clone() for name, value in engine.full_parameters()}
    poisoned = batches()
    poisoned[1]["image"][0] = torch.inf
    result = engine.train_step(poisoned)
    assert result.skipped
    assert all(torch.equal(before[name], value) for name, value in engine.full_parameters())
    assert not engine.train_step(batches()).skipped


@pytest.mark.parametrize("stage", [0, 2])
def test_a_copy_is_not_changed_by_the_steps_after_it(world, tmp_path, stage):
    engine = make(world, {"zero_optimization": {"stage": stage}})
    engine.model.register_buffer("seen", torch.zeros(3))
    engine.train_step(batches())
    folders = [tmp_path / name for name in ("now", "later", "not copied")]
    for folder in folders:
        folder.mkdir()
    engine.take_state().write(folders[0])
    taken = engine.take_state(copy=True), engine.take_state()
    engine.train_step(batches())
    engine.model.seen += 1
    for state, folder in zip(taken, folders[1:], strict=True):
        state.write(folder)
    names = [path.relative_to(folders[0]) for path in folders[0].rglob("*.*")]
    assert {path.name for path in names} >= {"replicated.safetensors", "rank_00000.json"}
    contents = [{name: (folder / name).read_bytes() for name in names} for folder in folders]
    assert contents[1] == contents[0]
    assert contents[2] != contents[0]


def test_evaluation_leaves_train_mode_and_gradients_as_they_were(engine):
    with engine.evaluating() as model:
        assert not model.training
        logits = model(torch.zeros(1, 3, 32, 32))
        assert not logits.requires_grad
    assert engine.model.training
    assert torch.is_grad_enabled()


def test_full_parameters_are_fp32(engine):
    assert all(value.dtype == torch.float32 for _, value in engine.full_parameters())


def test_a_typo_inside_a_block_gets_the_nearest_key(world):
    with pytest.raises(ConfigError) as caught:
        make(world, {"zero_optimization": {"stage": 1, "overlap_com": True}})
    assert "deepspeed.zero_optimization.overlap_com" in str(caught.value)
    assert "'overlap_comm'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_type_inside_a_block_names_the_key(world):
    with pytest.raises(ConfigError, match=r"deepspeed\.zero_optimization\.stage"):
        make(world, {"zero_optimization": {"stage": 7}})


def test_fp16_is_refused_in_words_where_the_device_has_none(world, monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match=r"precision\.dtype"):
        make(world, {"zero_optimization": {"stage": 1}}, "fp16")


START = """
import sys, torch
from routedvit.training import engine
from routedvit.training.config.native import resolve_native_config
world = engine.start()
module = torch.nn.Module()
module.model = torch.nn.Linear(2, 2)
module.forward = lambda image, target, position: (module.model(image).sum(), {})
native = resolve_native_config({"zero_optimization": {"stage": 2}}, batch_size=1, grad_clip=None,
    micro_batch_size=1, world_size=1, dtype="fp32", num_parameters=1)
built = engine.Engine(world, module, torch.optim.AdamW(module.parameters()), native)
zero = torch.zeros(1)
built.train_step([{"image": torch.ones(1, 2), "target": zero, "position": zero}])
assert "torch._inductor.compile_fx" not in sys.modules, "Inductor was loaded"
"""


def test_a_start_compiles_nothing_and_ends_cleanly(tmp_path):
    """No C++ extension is built and Inductor is not loaded: together 30 to 40 s of a cold start."""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", START], env=environment, cwd=root, check=True)
    assert not (tmp_path / "extensions").exists()
