"""The run config's model is built through timm, seeded, and refused in words when it cannot be."""

import pytest
import torch

from routedvit.training.config.run import ConfigError, ModelConfig
from routedvit.training.model import create_model, set_checkpointing

SMALL = {"img_size": 32, "depth": 1}


def test_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    config = ModelConfig(name="vit_tiny_patch16_224", kwargs=SMALL)
    weights = [create_model(config, num_classes=3, seed=seed).head.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].shape[0] == 3


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"vit_tinny_patch16_224.*vit_tiny_patch16_224"):
        create_model(ModelConfig(name="vit_tinny_patch16_224"), num_classes=3, seed=0)


def test_unknown_argument_is_named() -> None:
    config = ModelConfig(name="vit_tiny_patch16_224", kwargs={"image_size": 32})
    with pytest.raises(ConfigError, match=r"model.kwargs.*image_size"):
        create_model(config, num_classes=3, seed=0)


def test_too_few_classes_are_refused() -> None:
    config = ModelConfig(name="vit_tiny_patch16_224", kwargs=SMALL | {"num_classes": 2})
    with pytest.raises(ConfigError, match="data set has 3 classes"):
        create_model(config, num_classes=3, seed=0)


def test_a_model_that_does_not_route_recomputes_all_blocks_or_none() -> None:
    model = create_model(
        ModelConfig(name="vit_tiny_patch16_224", kwargs=SMALL), num_classes=3, seed=0
    )
    set_checkpointing(model, "block")
    assert model.grad_checkpointing
    with pytest.raises(ConfigError, match=r"heavy/1: VisionTransformer does not route"):
        set_checkpointing(model, "heavy")
