"""Distillation: distances, what the teacher sees, and that nobody trains or saves it."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import routedvit  # noqa: F401  (registers the models)
from routedvit.training.config.recipe import TeacherConfig
from routedvit.training.config.run import ConfigError
from routedvit.training.objectives import DistillationObjective, build_loss, build_mixup
from routedvit.training.objectives.distillation import soft_distance
from routedvit.training.objectives.teacher import Teacher, build_teacher

CPU = torch.device("cpu")


def distillation(**kwargs: Any) -> DistillationObjective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    advice = torch.randn(8, 3)
    return DistillationObjective(model, build_loss("softmax"), teacher=lambda _: advice, **kwargs)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(8, 3, 2, 2, generator=generator)
    return image, torch.arange(8) % 3, torch.arange(8)


def test_soft_distance_is_the_divergence_times_the_squared_temperature() -> None:
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(soft_distance(student, teacher, 3.0), expected)
    assert soft_distance(teacher, teacher, 3.0).abs() < 1e-6


def test_the_teacher_weighs_alpha_and_the_labels_the_rest() -> None:
    image, target, position = batch()
    objective = distillation(alpha=0.3, temperature=2.0)
    logits, advice = objective.model(image), objective.teacher(image)
    expected = 0.7 * F.cross_entropy(logits, target) + 0.3 * soft_distance(logits, advice, 2.0)
    loss, metrics = objective(image, target, position)
    torch.testing.assert_close(loss, expected)
    agree = 100 * (logits.argmax(1) == advice.argmax(1)).float().mean()
    assert metrics["agreement"] == agree
    assert set(metrics) == {"top1", "agreement"}


def test_hard_distillation_takes_the_teachers_first_choice_as_label() -> None:
    image, target, position = batch()
    objective = distillation(kind="hard", alpha=1.0)
    expected = F.cross_entropy(objective.model(image), objective.teacher(image).argmax(1))
    torch.testing.assert_close(objective(image, target, position)[0], expected)


def test_teacher_and_student_see_the_same_mixed_images() -> None:
    seen: list[Tensor] = []
    objective = distillation()
    objective.mixup = build_mixup(
        0.8, 0.0, label_smoothing=0.0, num_classes=3, batch_size=8, seed=0
    )
    objective.loss = build_loss("softmax", mixed=True)
    objective.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    advice = torch.randn(8, 3)
    objective.teacher = lambda image: (seen.append(image), advice)[1]
    image, target, position = batch()
    objective(image, target, position)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], image)


def small_teacher(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=3, img_size=32, patch_size=8, **kwargs)


def test_the_teacher_is_no_part_of_the_objective() -> None:
    """Neither its weights nor its mode: DeepSpeed would cast, split and save them."""
    network = small_teacher(drop_path_rate=0.5)
    teacher = Teacher(network, mean=[0.5] * 3, std=[0.5] * 3, device=CPU)
    objective = distillation()
    before = list(objective.state_dict())
    objective.teacher = teacher
    assert list(objective.state_dict()) == before
    objective.train().bfloat16()
    assert not any(module.training for module in network.modules())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())
    assert not teacher(torch.randn(2, 3, 32, 32)).requires_grad


def test_images_are_renormalised_and_resized_for_the_teacher() -> None:
    network = small_teacher(
        dynamic_img_size=False,
        pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
    )
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.2, 0.3])
    teacher = Teacher(network, mean=mean.tolist(), std=std.tolist(), device=CPU)
    teacher((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    own = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).view(2, 3, 1, 1)
    torch.testing.assert_close(seen[0], (pixels - own[0]) / own[1])
    teacher(torch.randn(2, 3, 48, 48))
    assert seen[1].shape == (2, 3, 32, 32)


def test_grey_images_become_three_equal_channels() -> None:
    teacher = Teacher(small_teacher(), mean=[0.1], std=[0.3], device=CPU)
    assert teacher(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    with pytest.raises(ConfigError, match=r"takes 1 channels, the images have 3.*in_chans"):
        Teacher(small_teacher(in_chans=1), mean=[0.1] * 3, std=[0.3] * 3, device=CPU)


def test_low_precision_is_autocast() -> None:
    network = small_teacher()
    image = torch.randn(2, 3, 32, 32)
    full, half = (
        Teacher(network, mean=[0.5] * 3, std=[0.5] * 3, device=CPU, dtype=dtype)(image)
        for dtype in ("fp32", "bf16")
    )
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, atol=0.05, rtol=0.05)


def build(config: dict[str, Any], num_classes: int = 3) -> Teacher:
    return build_teacher(
        TeacherConfig(**config),
        num_classes=num_classes,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        device=CPU,
        dtype="fp32",
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    path = tmp_path / "teacher.safetensors"
    save_file({name: w.contiguous() for name, w in small_teacher().state_dict().items()}, path)
    return str(path)


KWARGS = {"img_size": 32, "patch_size": 8}


def test_a_teacher_is_fed_what_its_weights_were_trained_on(checkpoint: str) -> None:
    """By the config.json that timm and an export write beside them."""
    seen = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = {"architecture": "test_vit", "pretrained_cfg": {**seen, "tag": "mine"}}
    Path(checkpoint).with_name("config.json").write_text(json.dumps(config))
    teacher = build({"name": "test_vit", "kwargs": KWARGS, "checkpoint": checkpoint})
    same = Teacher(
        small_teacher(pretrained_cfg_overlay=seen), mean=[0.5] * 3, std=[0.5] * 3, device=CPU
    )
    assert torch.equal(teacher.factor, same.factor)
    assert torch.equal(teacher.offset, same.offset)


@pytest.mark.filterwarnings("ignore:objective.teacher.checkpoint")
def test_a_teacher_of_any_size_gets_the_size_it_is_made_with(checkpoint: str) -> None:
    kwargs = {**KWARGS, "dynamic_img_size": True}
    assert build({"name": "test_vit", "kwargs": kwargs, "checkpoint": checkpoint}).size == (32, 32)


def test_a_teacher_is_read_from_a_checkpoint(checkpoint: str) -> None:
    with pytest.warns(UserWarning, match=r"config.json does not say what the images"):
        teacher = build({"name": "test_vit", "kwargs": KWARGS, "checkpoint": checkpoint})
    image = torch.randn(2, 3, 32, 32)
    even = [0.5] * 3
    same = Teacher(small_teacher(), mean=even, std=even, device=CPU, model_kwargs=KWARGS)
    assert torch.equal(teacher(image), same(image))


@pytest.mark.filterwarnings("ignore:objective.teacher.checkpoint")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "test_vit"}, "needs weights: give one of"),
        ({"name": "test_vit", "checkpoint": "nowhere.pth"}, "nowhere.pth does not exist"),
        ({"name": "test_vitt", "checkpoint": __file__}, r"'test_vitt': Unknown model"),
        ({"name": "test_vit", "checkpoint": "HERE"}, r"'test_vit': .*size mismatch"),
        (
            {"name": "test_vit", "kwargs": {**KWARGS, "num_classes": 3}, "checkpoint": "HERE"},
            "knows 3 classes, the student 4",
        ),
        ({"name": "local-dir:nowhere", "pretrained": True}, "local-dir:nowhere"),
        ({"name": "local-dir:RUN", "pretrained": True}, "of a run name the folder of its weights"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_in_words(
    config: dict[str, Any], words: str, checkpoint: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"config": {"name": "a run"}}')
    config = {**config, "name": config["name"].replace("RUN", str(tmp_path))}
    if config.get("checkpoint") == "HERE":
        config = {**config, "checkpoint": checkpoint}
    with pytest.raises(ConfigError, match=words):
        build(config, num_classes=4)


def test_the_student_follows_the_teacher_where_labels_are_noise() -> None:
    torch.manual_seed(0)
    truth = nn.Linear(12, 3)
    objective = DistillationObjective(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3)),
        build_loss("softmax"),
        teacher=lambda image: truth(image.flatten(1)).detach() * 5,
        alpha=1.0,
    )
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    for _ in range(150):
        loss, metrics = objective(torch.randn(64, 3, 2, 2), torch.randint(0, 3, (64,)), None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["agreement"] > 95
