"""The run config's model is built through timm, seeded, and refused in words when it cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from routedvit.training.config.recipe import DistillConfig, MaskedConfig, SupervisedConfig
from routedvit.training.config.run import ConfigError, ModelConfig
from routedvit.training.model import check_labels, create_model, set_checkpointing

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


def test_labels_of_one_class_teach_nothing() -> None:
    distill: dict[str, Any] = {"name": "distill", "teacher": {"name": "vit_tiny_patch16_224"}}
    for objective in (SupervisedConfig(), DistillConfig(**distill)):
        check_labels(objective, 2)
        with pytest.raises(ConfigError, match=r"one class.*objective\.name = 'mae'"):
            check_labels(objective, 1)
    check_labels(DistillConfig(**distill, alpha=1), 1)
    check_labels(MaskedConfig(name="mae"), 1)


def test_too_few_classes_are_refused() -> None:
    config = ModelConfig(name="vit_tiny_patch16_224", kwargs=SMALL | {"num_classes": 2})
    with pytest.raises(ConfigError, match="data set has 3 classes"):
        create_model(config, num_classes=3, seed=0)


@pytest.mark.parametrize("given", [None, "ten", True, 3.0])
def test_classes_that_are_no_number_are_refused(given: object) -> None:
    config = ModelConfig(name="vit_tiny_patch16_224", kwargs=SMALL | {"num_classes": given})
    with pytest.raises(ConfigError, match=r"model\.kwargs\.num_classes is .*leave it out"):
        create_model(config, num_classes=3, seed=0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("colt5_vit_test.in1k", r"no weights 'in1k' of colt5_vit_test; write 'colt5_vit_test'$"),
        ("vit_tiny_patch16_224.in2k", r"write 'vit_tiny_patch16_224', or give one of: .*augreg"),
    ],
)
def test_an_unknown_tag_is_refused_with_those_there_are(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.name: .*{words}"):
        create_model(ModelConfig(name=name), num_classes=3, seed=0)


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "vit_giant_patch14_224.untrained"])
def test_a_known_tag_passes(name: str) -> None:
    small = {"img_size": 28, "patch_size": 14, "depth": 1, "embed_dim": 64, "num_heads": 4}
    create_model(ModelConfig(name=name, kwargs=small), num_classes=3, seed=0)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"embed_dim": -4}, "negative dimension"),
        ({"num_heads": 0}, "ZeroDivisionError"),
        ({"num_heads": 7}, "divisible by num_heads"),
        ({"act_layer": "gulu"}, "KeyError 'gulu'"),
    ],
)
def test_an_argument_that_no_model_can_have_is_refused_in_words(
    kwargs: dict[str, object], words: str
) -> None:
    config = ModelConfig(name="test_vit", kwargs=kwargs)
    with pytest.raises(ConfigError, match=f"model.kwargs: test_vit refuses them: .*{words}"):
        create_model(config, num_classes=3, seed=0)


def test_weights_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    for kwargs, words in (
        ({"pretrained": True}, r"model\.kwargs\.pretrained: .*No pretrained weights exist"),
        ({"checkpoint_path": f"{tmp_path}/none.pth"}, r"checkpoint_path = .* does not exist"),
    ):
        with pytest.raises(ConfigError, match=words):
            create_model(ModelConfig(name="colt5_vit_test", kwargs=kwargs), num_classes=3, seed=0)


@pytest.mark.parametrize("kind", ["no weights", "empty", "safetensors", "of another model"])
def test_weights_that_cannot_be_read_or_taken_are_refused_in_a_line(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    path.write_bytes(b"" if kind == "empty" else b"no weights at all")
    if kind == "of another model":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    config = ModelConfig(name="test_vit", kwargs={"checkpoint_path": str(path)})
    with pytest.raises(ConfigError) as caught:
        create_model(config, num_classes=3, seed=0)
    text = str(caught.value)
    assert text.startswith(f"model.kwargs.checkpoint_path = {str(path)!r}: test_vit cannot take")
    assert "\n" not in text
    assert len(text) < 600


def test_a_model_that_does_not_route_recomputes_all_blocks_or_none() -> None:
    model = create_model(
        ModelConfig(name="vit_tiny_patch16_224", kwargs=SMALL), num_classes=3, seed=0
    )
    set_checkpointing(model, "block")
    assert model.grad_checkpointing
    with pytest.raises(ConfigError, match=r"heavy/1: VisionTransformer does not route"):
        set_checkpointing(model, "heavy")
