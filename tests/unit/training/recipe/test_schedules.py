"""What changes by step acts inside the step and rests outside of it."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from routedvit.training.recipe.schedules import Schedules


class Recorder:
    def __init__(self, setting=""):
        self.calls, self.name = [], setting

    def turn(self, step):
        self.calls.append(step)

    def rest(self):
        self.calls.append("rest")

    def scalars(self):
        return {"train/x": float(self.calls[0])}

    def setting(self):
        return self.name


def test_dials_are_turned_in_a_step_and_rest_after_it_even_when_it_fails():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    dial = Recorder()
    schedules = Schedules(CosineLRScheduler(optimizer, 10, t_in_epochs=False), [dial])
    with schedules.at(5):
        assert dial.calls == [5]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    with pytest.raises(RuntimeError), schedules.at(6):
        raise RuntimeError
    assert dial.calls == [5, "rest", 6, "rest"]
    assert schedules.scalars() == {"train/x": 5.0}


def test_losses_are_comparable_where_all_dials_say_the_same():
    dials = [Recorder("64 px"), Recorder(), Recorder("capacity x 2")]
    assert Schedules(None, dials).setting() == "64 px capacity x 2"
    assert Schedules(None, [Recorder()]).setting() == Schedules(None).setting() == ""
