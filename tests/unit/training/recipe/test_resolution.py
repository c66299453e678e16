"""Image sizes by step: shrunk as they enter the objective, full size outside of training steps."""

import pytest
import timm
import torch
from torch.nn import functional as F

import routedvit  # noqa: F401  (registers the models)
from routedvit.training.config.run import ConfigError
from routedvit.training.objectives import SupervisedObjective, build_loss
from routedvit.training.recipe.resolution import ResolutionDial, check_resampling

STAGES = [(2, 32), (5, 48)]


def objective(**kwargs):
    torch.manual_seed(0)
    kwargs = {"dynamic_img_size": True, "img_size": 64, "depth": 2, "num_classes": 5} | kwargs
    return SupervisedObjective(timm.create_model("colt5_vit_test", **kwargs), build_loss("softmax"))


def test_sizes_change_at_the_given_steps():
    dial = ResolutionDial(objective(), STAGES, (64, 64))
    sizes, settings = [], []
    for step in range(7):
        dial.turn(step)
        sizes.append(dial.size[0])
        dial.rest()
        assert dial.size == (64, 64)
        settings.append(dial.setting())  # still that of the step
    assert sizes == [32, 32, 48, 48, 48, 64, 64]
    assert settings == [f"{size} px" for size in sizes]
    assert dial.scalars() == {"train/image_size": 64.0}


@pytest.mark.parametrize(
    "kwargs", [{}, {"rope": True}, {"pos_embed": "sincos"}, {"pos_embed": "none"}]
)
def test_the_model_learns_on_the_shrunk_image(kwargs):
    whole, image, target = objective(**kwargs), torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    position = torch.arange(2)
    dial = ResolutionDial(whole, STAGES, (64, 64))
    dial.turn(0)
    loss, _ = whole(image, target, position)
    small = F.interpolate(image, (32, 32), mode="bilinear", antialias=True)
    dial.rest()
    assert torch.equal(loss, whole(small, target, position)[0])
    assert not torch.equal(loss, whole(image, target, position)[0])
    loss.backward()
    assert all(parameter.grad is not None for parameter in whole.parameters())


@pytest.mark.parametrize(
    ("stages", "kwargs", "size", "words"),
    [
        ([(2, 40)], {}, (64, 64), "multiple of the patch size 16"),
        ([(2, 80)], {}, (64, 64), "at most the image size 64"),
        ([(5, 32), (2, 48)], {}, (64, 64), "later than the one before"),
        ([(2, 32), (2, 48)], {}, (64, 64), "later than the one before"),
        (STAGES, {"dynamic_img_size": False}, (64, 64), "dynamic_img_size = true"),
        (STAGES, {}, (64, 80), "square"),
    ],
)
def test_what_cannot_be_is_refused_with_the_mend(stages, kwargs, size, words):
    with pytest.raises(ConfigError, match=words):
        ResolutionDial(objective(**kwargs), stages, size)


def test_learned_positions_are_refused_where_their_resampling_has_no_order() -> None:
    learned, fixed = (objective(pos_embed=kind).model for kind in ("learn", "sincos"))
    check_resampling(learned, torch.device("cpu"))
    check_resampling(fixed, torch.device("cuda"))
    with pytest.raises(ConfigError, match="pos_embed = 'sincos'"):
        check_resampling(learned, torch.device("cuda"))
