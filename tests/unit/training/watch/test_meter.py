"""Speed and waiting."""

import pytest

from routedvit.training.watch.meter import Meter


def test_speed_and_waiting_share():
    meter = Meter(batch_size=10)
    meter.add(seconds=5.0, waited=5.0)
    meter.read()
    meter.add(seconds=1.0, waited=0.25)
    meter.add(seconds=1.0, waited=0.25)
    assert meter.read() == pytest.approx((10.0, 0.25))
    assert meter.average() == pytest.approx(10.0)  # the first step starts everything up


def test_step_times_come_once_and_without_the_first():
    meter = Meter(batch_size=10)
    for seconds in (5.0, 1.0, 2.0):
        meter.add(seconds=seconds, waited=0.5)
    assert meter.step_seconds() == [1.0, 2.0]
    assert meter.step_seconds() == []
    assert meter.average_wait() == pytest.approx(1 / 3)
