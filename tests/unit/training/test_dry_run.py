"""A dry run refuses what a start would refuse: the key, its value and the mend, before any figure.

Found by the functions that build the run (see test_mistakes.py for starts), so one case a builder
is enough. What it prints is held against the figures in test_rehearsal.py.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

import train
from routedvit.training import engine as engines
from routedvit.training.config.file import load_config
from routedvit.training.config.run import ConfigError
from routedvit.training.dry_run import Machine, rehearse

QUICKSTART = str(Path(__file__).resolve().parents[3] / "configs" / "quickstart.json")
SMALL = ["model.kwargs.depth=1", "train.batch_size=32", "schedule.warmup_epochs=0"]
DENSE = ["model.name=test_vit", 'model.kwargs={"img_size":28,"patch_size":4,"in_chans":1}']
TEACHER = {"name": "test_vit", "kwargs": {"img_size": 32, "patch_size": 8}}

MISTAKES: dict[str, tuple[list[str], str]] = {
    "fewer classes": (
        ["model.kwargs.num_classes=5"],
        "model.kwargs.num_classes is 5, but the data set has 10 classes; leave it out",
    ),
    "no number of classes": (["model.kwargs.num_classes=null"], "num_classes is None.*leave it"),
    "warm-up": (
        ["schedule.warmup_epochs=40"],
        "schedule.warmup_epochs makes 5000 steps of a run of 4000; shorten it",
    ),
    "warm-up of a run in steps": (
        ["schedule.warmup_epochs=1", "train.epochs=null", "train.steps=9"],
        "schedule.warmup_epochs makes 125 steps of a run of 9; shorten it",
    ),
    "rsqrt": (["schedule.name=rsqrt"], "schedule.timescale_epochs is missing"),
    "fixed size": (
        ['resolution.stages=[{"until":0.5,"size":24}]', "model.kwargs.dynamic_img_size=false"],
        "resolution.stages needs .* set model.kwargs.dynamic_img_size = true",
    ),
    "patch size": (
        ['resolution.stages=[{"until":0.5,"size":13}]', "model.kwargs.dynamic_img_size=true"],
        "resolution.stages: size = 13 must be a multiple of the patch size 4",
    ),
    "capacity of a dense model": (
        [*DENSE, "capacity.schedule=anneal", "capacity.end=0.5"],
        "capacity.schedule needs a model that routes.*set it to 'none'",
    ),
    "policy of a dense model": (
        [*DENSE, "train.grad_checkpointing=heavy"],
        "train.grad_checkpointing = heavy.*use true or false",
    ),
    "capacities of an autoencoder": (
        ["objective.name=mae", "objective.decoder_depth=1", "eval.capacities={}"],
        "eval.capacities needs a routed model that classifies; delete it",
    ),
    "nothing to evaluate on": (
        ["data.val=null", "eval.knn={}"],
        "eval.knn needs held-out images; name them in data.val.shards",
    ),
    "best by no evaluator": (
        ["checkpoint.best_metric=knn/top1"],
        "checkpoint.best_metric = 'knn/top1': no evaluator has that name; there are: val$",
    ),
    "best by weights that are not evaluated": (
        ["checkpoint.best_metric=val/top1", "ema.decay=0.9", "eval.weights=ema"],
        "checkpoint.best_metric = 'val/top1': .* there are: val_ema$",
    ),
    "averages that are not kept": (
        ["eval.weights=ema"],
        'eval.weights = "ema" would do nothing: it needs ema.decay, such as 0.9999; set that, or',
    ),
    "best of nothing": (
        ["checkpoint.keep_best=1", "data.val=null"],
        r"checkpoint.best_metric = 'val/top1': .*none \(set data.val.shards\)",
    ),
    "a copy that nobody can serve": (
        ["checkpoint.mirror=nowhere://bucket/runs"],
        "checkpoint.mirror: nowhere://bucket/runs: .*nowhere",
    ),
    "teacher of other classes": (
        ["objective.name=distill", "objective.teacher.pretrained=true",
         "objective.teacher.name=vit_base_patch16_224.augreg_in21k"],
        "objective.teacher 'vit_base_patch16_224.augreg_in21k' knows 21843 classes, the student 10",
    ),
    "teacher without weights": (
        ["objective.name=distill", "objective.teacher.name=test_vit"],
        "objective.teacher.checkpoint",
    ),
    "odd pairs": (["loss.mixup=0.2", "train.micro_batch_size=1"], "even train.micro_batch_size"),
    "shards of Adam": (["optim.name=lamb"], "optim.name"),
    "partial offload": (
        ['deepspeed.zero_optimization.offload_optimizer={"device":"cpu","ratio":0.5}'],
        r"offload_optimizer\.ratio = 0\.5: it needs an extension",
    ),
    "tag": (["model.name=colt5_vit_test.in1k"], "no weights 'in1k' of colt5_vit_test; write 'colt"),
    "weights of none": (
        ["model.kwargs.pretrained=true"],
        "model.kwargs.pretrained: colt5_vit_test cannot take these weights: .*leave it out",
    ),
    "no file of weights": (
        ["model.kwargs.checkpoint_path=none.pth"],
        "model.kwargs.checkpoint_path = 'none.pth' does not exist",
    ),
    "stage in words": (
        ["deepspeed.zero_optimization.stage=two"],
        'deepspeed.zero_optimization.stage = "two" is no ZeRO stage; write 0',
    ),
    "another batch": (
        ["deepspeed.train_batch_size=64"],
        "deepspeed.train_batch_size = 64 contradicts train.batch_size, which makes it 32; delete",
    ),
    "auto": (["deepspeed.gradient_accumulation_steps=auto"], '"auto": only Hugging Face trainers'),
    "DeepSpeed's keys": (["deepspeed.zero_optimization.stge=1"], "did you mean 'stage'"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def untouched() -> Any:
    """A world that ended in a mistake is left as any other."""
    linear, environment = nn.functional.linear, dict(os.environ)
    yield
    assert not torch.distributed.is_initialized()
    engines.stop()
    nn.functional.linear = linear
    os.environ.clear()
    os.environ.update(environment)


def data_of(config: Any) -> Any:
    """The digits, as far as a dry run asks for them."""
    return SimpleNamespace(
        num_classes=10,
        samples_per_epoch=4000,
        missing="",
        evaluates=config.data.val is not None,
        describe=lambda **options: [],
    )


def dry_run(*overrides: str, **known: Any) -> list[str]:
    config = load_config(train.RunConfig, QUICKSTART, [*SMALL, *overrides])
    data = SimpleNamespace(**vars(data_of(config)) | known)
    return list(rehearse(config, data, Machine(1, 80), search=False))


@pytest.mark.parametrize(("overrides", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_dry_run_refuses(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as found:
        dry_run(*overrides)
    assert re.search(words, str(found.value))


def test_a_dense_model_is_told_what_it_can_recompute() -> None:
    words = "\n".join(dry_run("model.name=test_vit", "model.kwargs.dynamic_img_size=false"))
    (policies,) = re.findall("activations by train.grad_checkpointing: (.*)", words)
    assert [entry.split()[0] for entry in policies.split(", ")] == ["false", "block"]


def test_a_teacher_whose_weights_lie_here_is_read(tmp_path: Path) -> None:
    teacher = timm.create_model("test_vit", num_classes=7, **TEACHER["kwargs"])
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    named = f'{{"name":"test_vit","checkpoint":"{tmp_path}/teacher.pth","kwargs":{{}}}}'
    with pytest.raises(ConfigError, match=r"objective\.teacher 'test_vit'"):
        dry_run("objective.name=distill", f"objective.teacher={named}")


@pytest.mark.parametrize(
    ("overrides", "known"),
    [
        (["model.kwargs.num_classes=12"], {}),
        (["objective.name=mae", "objective.decoder_depth=1"], {}),
        (["model.kwargs.num_classes=5"], {"num_classes": None, "missing": "no shard matches"}),
    ],
    ids=["more classes", "without labels", "no data to compare with"],
)
def test_classes_that_a_start_takes_pass(overrides: list[str], known: dict[str, Any]) -> None:
    assert "parameters" in dry_run(*overrides, **known)[-1]


def test_a_length_in_steps_is_no_mistake_before_there_are_data() -> None:
    overrides = ["schedule.warmup_epochs=1", "train.epochs=null", "train.steps=9"]
    absent = {"samples_per_epoch": None, "num_classes": None, "missing": "no shard matches"}
    _, data, figures = dry_run(*overrides, **absent)
    assert data == (
        "data         cannot be read yet, so a start would be refused: no shard matches\n"
        "data         1000 classes are assumed; model.kwargs.num_classes says others"
    )
    assert "parameters" in figures
