"""The baseline of `benchmarks.startup`: a ten-step DeepSpeed script as its tutorial writes one."""

import argparse

import deepspeed
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank")
parser.parse_args()

model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters()),
    config={"train_micro_batch_size_per_gpu": 32, "zero_optimization": {"stage": 2}},
)
for _ in range(10):
    loss = engine(torch.randn(32, 64)).square().mean()
    engine.backward(loss)
    engine.step()
    if engine.global_rank == 0:
        print("first step", flush=True)
