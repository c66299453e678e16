"""fp16 with dynamic loss scaling on the devices it is for; test_precision.py forces it on CPUs."""

import pytest
import torch

from routedvit.training import engine as engines
from routedvit.training.config.native import resolve_native_config
from routedvit.training.engine import Engine
from tests.integration import toy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_skips_until_its_scale_fits_and_then_learns(stage):
    world = engines.start()
    objective = toy.objective()
    native = resolve_native_config(
        {
            "zero_optimization": {"stage": stage},
            "fp16": {"initial_scale_power": 32, "hysteresis": 1},
        },
        batch_size=toy.BATCH,
        micro_batch_size=toy.BATCH,
        world_size=1,
        grad_clip=1.0,
        dtype="fp16",
        num_parameters=100_000,
    )
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    engine = Engine(world, objective, optimizer, native)
    rows = toy.batch(range(toy.BATCH))
    results = [engine.train_step([rows]) for _ in range(60)]
    assert results[0].skipped
    assert results[0].loss_scale < 2.0**32
    assert not any(result.skipped for result in results[-20:])
    assert results[-1].loss < 0.8 * results[0].loss
    engines.stop()
