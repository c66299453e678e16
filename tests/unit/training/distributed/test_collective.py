"""What ranks agree on, without ranks: the group's answers are given."""

import pytest
import torch.distributed as dist

from routedvit.training.config.run import ConfigError
from routedvit.training.distributed.collective import must_agree


@pytest.mark.parametrize(
    ("values", "named"),
    [(["a", "a", "a"], None), (["a", "b", "a"], "rank 1 has"), (["a", "b", "c"], "rank 1, 2 has")],
)
def test_ranks_that_differ_from_rank_0_are_named(monkeypatch, values, named):
    monkeypatch.setattr(dist, "get_world_size", lambda: len(values))
    monkeypatch.setattr(dist, "all_gather_object", lambda out, _: out.__setitem__(slice(3), values))
    if named is None:
        must_agree("shards", values[0], "copy them")
        return
    with pytest.raises(ConfigError, match=f"{named} other shards than rank 0; copy them"):
        must_agree("shards", values[0], "copy them")
