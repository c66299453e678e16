"""What an engine is not built of."""

import pytest
from torch import nn

from routedvit.training.assembly import check_statistics
from routedvit.training.config.run import ConfigError


def test_running_statistics_are_refused_by_name_and_their_absence_is_not() -> None:
    """Each rank would gather its own."""
    objective = nn.ModuleDict({"model": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))})
    with pytest.raises(ConfigError, match=r"model.name: 1 is a BatchNorm2d"):
        check_statistics(objective)
    check_statistics(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.LayerNorm(4)))
