"""Sections of what changes by step: contradictions are refused, defaults change nothing."""

import pytest
from pydantic import ValidationError

from routedvit.training.config.recipe import (
    CapacityConfig,
    DistillConfig,
    EmaConfig,
    LossConfig,
    OptimConfig,
    ResolutionConfig,
    ScheduleConfig,
    TeacherConfig,
)
from routedvit.training.config.watch import EvalConfig, GuardConfig

TEACHER = TeacherConfig(name="test_vit", pretrained=True)


def test_by_default_nothing_is_scheduled():
    assert EmaConfig().decay is None
    assert CapacityConfig().schedule == "none"
    assert ResolutionConfig().stages == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"schedule": "anneal"}, "start and end that differ"),
        ({"schedule": "sample"}, "start and end that differ"),
        ({"schedule": "anneal", "start": 4.0, "factors": [1.0]}, "'sample' only"),
        ({"schedule": "sample", "factors": [1.0, 0.0]}, "greater than 0"),
        ({"schedule": "sample", "factors": []}, "at least 1 item"),
        ({"schedule": "anneal", "start": 4.0, "levels": 1}, "greater than or equal to 2"),
    ],
)
def test_a_capacity_schedule_that_cannot_be_is_refused(values, words):
    with pytest.raises(ValidationError, match=words):
        CapacityConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": "anneal", "start": 4.0, "end": 1.0, "until": 0.5, "shape": "cosine"},
        {"schedule": "sample", "factors": [0.5, 1.0, 2.0]},
        {"schedule": "sample", "start": 0.5, "end": 2.0, "levels": 4},
    ],
)
def test_capacity_schedules_that_can_be(values):
    assert CapacityConfig(**values).model_dump(exclude_unset=True) == values


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        (OptimConfig, {"lr": 1.0, "lr_scaling": "sqrt"}, 'lr_scaling = "sqrt".*lr_batch_size'),
        (EmaConfig, {"warmup": True}, "warmup = true would do nothing: it needs ema.decay"),
        (
            EmaConfig,
            {"decay": 0.9, "warmup_power": 0.75},
            "warmup_power = 0.75.* ema.warmup = true",
        ),
        (ScheduleConfig, {"timescale_epochs": 3.0}, 'timescale_epochs = 3.0.*name = "rsqrt"'),
        (ScheduleConfig, {"name": "wsd", "timescale_epochs": 3.0}, 'name = "rsqrt"'),
        (ScheduleConfig, {"decay": 0.1}, 'decay = 0.1.*schedule.name = "wsd" or "rsqrt"'),
        (ScheduleConfig, {"decay_shape": "linear"}, r"delete decay_shape \(its default is null\)"),
        (ScheduleConfig, {"warmup_lr": 1e-4}, "warmup_lr = 0.0001.*warmup_epochs above 0"),
        (LossConfig, {"mix_prob": 0.5}, "mix_prob = 0.5.*loss.mixup or loss.cutmix"),
        (LossConfig, {"mixup": 0.5, "mix_switch_prob": 0.3}, "both loss.mixup and loss.cutmix"),
        (CapacityConfig, {"start": 4.0}, 'start = 4.0.*capacity.schedule = "anneal" or "sample"'),
        (CapacityConfig, {"schedule": "sample", "start": 4.0, "until": 0.5}, "until = 0.5"),
        (CapacityConfig, {"schedule": "sample", "factors": [0.5], "end": 2.0}, "factors = null"),
        (GuardConfig, {"max_spikes": 3}, "max_spikes = 3 .*guard.spike_sigmas"),
        (EvalConfig, {"train_images": 500}, "train_images = 500 .*eval.knn or eval.linear_probe"),
        (EvalConfig, {"train_images": None}, r"train_images = null .*its default is 50000\)"),
        (
            DistillConfig,
            {"name": "distill", "teacher": TEACHER, "kind": "hard", "temperature": 2.0},
            'temperature = 2.0.*kind = "soft"',
        ),
    ],
)
def test_a_key_that_nothing_would_read_is_refused_with_what_makes_it_count(section, values, said):
    with pytest.raises(ValidationError, match=said):
        section(**values)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (OptimConfig, {"lr": 1.0, "lr_batch_size": 256, "lr_scaling": "sqrt"}),
        (EmaConfig, {"decay": 0.9, "warmup": True, "warmup_gamma": 2.0}),
        (ScheduleConfig, {"name": "wsd", "decay": 0.1, "decay_shape": "linear"}),
        (ScheduleConfig, {"name": "rsqrt", "decay": 0.1, "timescale_epochs": 3.0}),
        (LossConfig, {"cutmix": 1.0, "mix_prob": 0.5}),
        (LossConfig, {"cutmix": 1.0, "mixup": 0.2, "mix_switch_prob": 0.3}),
        (GuardConfig, {"spike_sigmas": 6.0, "spike_window": 64, "max_spikes": 3}),
        (CapacityConfig, {"schedule": "none", "start": 1.0, "levels": 5, "shape": "linear"}),
        (ScheduleConfig, {"decay": 0.2, "timescale_epochs": None}),
        (ScheduleConfig, {"warmup_epochs": 0.0, "warmup_lr": 1e-6}),
        # every recipe says min_lr, and a constant rate is a plausible --set on top of it
        (ScheduleConfig, {"name": "constant", "min_lr": 1e-6}),
        (ScheduleConfig, {"name": "constant", "warmup_epochs": 1.0, "warmup_lr": 1e-4}),
        (EvalConfig, {"train_images": 50_000}),
        (EvalConfig, {"linear_probe": {}, "train_images": None}),
    ],
)
def test_keys_that_are_read_and_defaults_that_are_said_pass(section, values):
    assert section(**values).model_dump(exclude_unset=True) == values
