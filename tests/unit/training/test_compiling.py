"""Compiled blocks: one graph for all of them, the same numbers, under ZeRO-3 and checkpointing."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch._dynamo.utils
from torch import nn

import train
from routedvit.training import assembly, compiling
from routedvit.training import engine as engines
from routedvit.training.compiling import compile_blocks, leaf_modules
from routedvit.training.config.file import load_config
from routedvit.training.config.native import resolve_native_config
from routedvit.training.config.run import ConfigError
from routedvit.training.distributed.world import World
from tests.integration import toy

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    linear = nn.functional.linear
    yield
    nn.functional.linear = linear
    torch._dynamo.reset()


@pytest.fixture
def only_traced(monkeypatch):
    """Traced in full by Dynamo; without Inductor, so that no C++ is compiled."""
    compiler = torch.compile
    monkeypatch.setattr(
        compiling.torch, "compile", lambda f, **options: compiler(f, backend="eager", **options)
    )


@pytest.mark.usefixtures("only_traced")
@pytest.mark.parametrize("policy", ["none", "heavy", "block"])
def test_a_block_is_one_graph_that_serves_all_blocks(policy):
    images = toy.batch(range(2))["image"]
    model = toy.model()
    expected = model(images)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    names = list(model.state_dict())
    model.set_grad_checkpointing(policy != "none", policy=policy)
    compile_blocks(model, CPU)
    found = model(images)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)
    assert list(model.state_dict()) == names
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.usefixtures("only_traced")
def test_every_drop_path_rate_may_meet_every_scheduled_capacity() -> None:
    """torch gives up after 8 versions of one piece of code; here it would end the run."""
    model = toy.model(drop_path_rate=0.5)
    shapes = [Fraction(1, n) for n in (2, 3, 4, 5, 6)]
    compile_blocks(model, CPU, shapes=len(shapes))
    images = toy.batch(range(2))["image"]
    for capacity in shapes:
        model.set_capacity(capacity)
        model.train()(images).sum().backward()
    model.eval()
    with torch.no_grad():
        model(images)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 8


def test_no_compiler_is_a_mistake_in_words(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"no g\+\+; install one, name it in CXX"):
        compile_blocks(toy.model(), CPU)


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.14.1"])
def test_a_torch_that_compiles_zero_3_wrongly_is_refused(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.15.0")
    compiling.check_right_under_zero3()
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ConfigError, match=r"train.compile = true under ZeRO-3 needs torch 2.15"):
        compiling.check_right_under_zero3()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_is_refused_before_its_engine_is_built(stage, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    monkeypatch.setattr(assembly, "Engine", lambda *arguments: "built")
    given = [f"deepspeed.zero_optimization.stage={stage}", "train.compile=true"]
    config = load_config(train.RunConfig, str(ROOT / "configs" / "quickstart.json"), given)
    world = World(0, 0, 1, CPU)
    if stage == 2:
        assert assembly.wrap_objective(config, toy.objective(), world)[0] == "built"
    else:
        with pytest.raises(ConfigError, match=r"train.compile = true under ZeRO-3"):
            assembly.wrap_objective(config, toy.objective(), world)


def test_a_model_without_blocks_is_named():
    with pytest.raises(ConfigError, match="ResNet has no blocks"):
        compile_blocks(timm.create_model("test_resnet"), CPU)


@pytest.mark.slow  # Inductor writes and compiles C++
@pytest.mark.parametrize(("stage", "policy"), [(2, "none"), (3, "block")])
def test_compiled_steps_equal_plain_pytorch(stage, policy):
    losses, norms, weights = toy.plain_run()
    world = engines.start()
    objective = toy.objective()
    objective.model.set_grad_checkpointing(policy != "none", policy=policy)
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {
            "leaf_module": leaf_modules(objective.model),
            "stage3_param_persistence_threshold": 0,
        }
    native = resolve_native_config(
        {"zero_optimization": zero},
        batch_size=toy.BATCH,
        micro_batch_size=toy.MICRO,
        world_size=1,
        grad_clip=toy.GRAD_CLIP,
        dtype="fp32",
        num_parameters=100_000,
    )
    compile_blocks(objective.model, CPU)
    optimizer = toy.optimizer(objective.model, stage)
    engine, schedule = (
        engines.Engine(world, objective, optimizer, native),
        toy.schedule(optimizer),
    )
    batches = toy.Loader(0, 1).batches(0)
    for step in range(toy.STEPS):
        with schedule.at(step):
            result = engine.train_step([next(batches) for _ in range(engine.accumulation)])
        assert result.loss == pytest.approx(losses[step], abs=1e-6)
        assert float(result.grad_norm) == pytest.approx(norms[step], rel=1e-3)
    for name, value in engine.full_parameters():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-5)
    with engine.evaluating() as model:  # hooks on routers would not be called in compiled code
        assert len(model.routing(toy.batch(range(2))["image"])) == 6
    engines.stop()
