"""The data section says what is wrong with it, and explains every key."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from data.config import AugmentConfig, DataConfig


def test_a_shards_pattern_is_all_that_must_be_given():
    config = DataConfig.model_validate({"train": {"shards": "x/*.tar"}})
    assert config.val is None
    assert config.normalize == "dataset"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, "train"),
        ({"train": {"shards": "x"}, "num_worker": 2}, "num_worker"),
        ({"train": {"shards": "x"}, "augment": {"hflip": 2}}, "hflip"),
        ({"train": {"shards": "x"}, "augment": {"scale": [1.0, 0.1]}}, "scale is"),
        ({"train": {"shards": "x"}, "augment": {"color_jitter": -0.4}}, "color_jitter"),
        ({"train": {"shards": "x"}, "augment": {"color_jitter": [0.4, -1, 0]}}, "color_jitter.1"),
        (
            {"train": {"shards": "x"}, "normalize": {"mean": [0.5], "std": [1, 1]}},
            "one per channel",
        ),
        ({"train": {"shards": "x"}, "normalize": {"mean": [0.5], "std": [0]}}, "std"),
        ({"train": {"shards": "x"}, "normalize": {"mean": [123.7], "std": [58.4]}}, "mean.0"),
        ({"train": {"shards": "x"}, "verify": "md5"}, "verify"),
        ({"train": {"shards": "x"}, "num_workers": "2"}, "num_workers"),
        ({"train": {"shards": "x"}, "num_workers": 2.0}, "num_workers"),
        ({"train": {"shards": "x"}, "log_samples": "yes"}, "log_samples"),
        ({"train": {"shards": "x"}, "crop_pct": "0.9"}, "crop_pct"),
        ({"train": {"shards": "x"}, "remote": {"cache_gb": float("inf")}}, "finite number"),
        ({"train": {"shards": "x"}, "augment": {"zoom": [0.9, float("inf")]}}, "finite number"),
        ({"train": {"shards": "x", "repeat": True}}, "repeat"),
        ({"train": [{"shards": "x", "weight": "2"}]}, "weight"),
    ],
)
def test_a_wrong_key_or_value_is_named(section, words):
    with pytest.raises(ValidationError, match=words):
        DataConfig.model_validate_json(json.dumps(section))


def test_a_whole_number_may_stand_for_a_share_and_a_list_for_a_range():
    augment = {"hflip": 1, "scale": [0.5, 1], "color_jitter": [0, 0.1, 1]}
    section = {"train": [{"shards": "x", "weight": 2}], "crop_pct": 1, "augment": augment}
    config = DataConfig.model_validate_json(json.dumps(section))
    assert config.augment.color_jitter == (0, 0.1, 1)
    assert DataConfig.model_validate_json(config.model_dump_json()) == config


def test_every_key_is_described_in_the_schema():
    schema = DataConfig.model_json_schema()
    for part in [schema, *schema["$defs"].values()]:
        for name, field in part["properties"].items():
            assert field.get("description"), name


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        (
            {"mode": "light", "re_prob": 1.0},
            "re_prob = 1.0 would do nothing: it needs mode = 'timm'",
        ),
        (
            {"mode": "light", "hflip": 1},
            "hflip = 1.0 would do nothing: it needs mode = 'timm', not",
        ),
        ({"mode": "none", "auto_augment": "3a"}, 'auto_augment = "3a" would do nothing'),
        ({"mode": "none", "shear": 0}, "it needs mode = 'light', not 'none'; set that, or delete"),
        ({"zoom": [0.5, 1]}, r"zoom = \[0.5, 1.0\] would do nothing: it needs mode = 'light'"),
        ({"re_count": 2}, "re_count = 2 would do nothing: it needs re_prob above 0"),
        ({"zoom": [0.5, 1]}, r"delete zoom \(its default is \[0.9, 1.1\]\)"),
    ],
)
def test_a_key_that_the_augmentation_would_not_read_is_refused(augment, said):
    section = {"train": {"shards": "x"}, "augment": augment}
    with pytest.raises(ValidationError, match=said):
        DataConfig.model_validate_json(json.dumps(section))


@pytest.mark.parametrize("mode", ["timm", "light", "none"])
def test_what_a_record_says_of_keys_that_a_mode_does_not_read_is_let_be(mode):
    config = AugmentConfig(mode=mode)
    assert AugmentConfig.model_validate_json(config.model_dump_json()) == config
