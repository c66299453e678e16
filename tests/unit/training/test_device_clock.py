"""A clock of what a device does, read now and then."""

import time

import torch

from routedvit.training.device_clock import DeviceClock


def test_a_clock_gives_the_mean_of_the_blocks_since_the_last_read():
    clock = DeviceClock(torch.device("cpu"))
    for seconds in (0.01, 0.03):
        with clock.timed():
            time.sleep(seconds)
    assert 0.02 <= clock.read() < 0.2
    assert clock.read() == 0.0
