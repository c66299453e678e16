"""Which checkpoints may go: never the newest, never one that a rule keeps."""

from __future__ import annotations

import math

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from routedvit.training.checkpoints.retention import Retention


def test_the_newest_stay():
    assert Retention(keep=2).surplus(dict.fromkeys((10, 20, 30, 40))) == [10, 20]


def test_the_newest_before_a_step_stays_to_go_back_to():
    values = dict.fromkeys((10, 20, 30, 40))
    assert Retention(keep=1).surplus(values, before=30) == [10, 30]
    assert Retention(keep=1).surplus(values, before=10) == [10, 20, 30]


def test_every_kth_stays_for_good():
    values = dict.fromkeys(range(10, 110, 10))
    assert Retention(keep=1, keep_every=50).surplus(values) == [10, 20, 30, 40, 60, 70, 80, 90]


def test_the_best_stay_in_the_named_direction():
    values = {1: 5.0, 2: 9.0, 3: 1.0, 4: None, 5: 7.0, 6: None}
    assert Retention(keep=1, keep_best=2).surplus(values) == [1, 3, 4]
    assert Retention(keep=1, keep_best=2, mode="min").surplus(values) == [2, 4, 5]


def test_a_tie_for_the_best_keeps_the_older():
    assert Retention(keep=1, keep_best=1).surplus({1: 5.0, 2: 5.0, 3: None}) == [2]
    assert not Retention(keep=1, keep_best=1).is_among_best(5.0, {1: 5.0})


def test_what_is_not_finite_is_no_best():
    rule = Retention(keep=1, keep_best=1, mode="min")
    assert rule.surplus({1: 2.0, 2: math.nan, 3: 1.0, 4: 9.0}) == [1, 2]
    assert rule.surplus({1: 2.0, 2: -math.inf, 3: 1.0, 4: 9.0}) == [1, 2]
    assert not rule.is_among_best(math.nan, {})
    assert rule.better(math.nan, 90.0) == rule.better(90.0, math.nan) == 90.0
    assert Retention().better(math.inf, 90.0) == 90.0


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=50)
@given(
    st.dictionaries(st.integers(1, 1000), st.none() | st.floats(), min_size=1),
    st.integers(1, 4),
    st.none() | st.integers(1, 50),
    st.integers(0, 3),
    st.sampled_from(["max", "min"]),
)
def test_whatever_the_rule_the_newest_stays(values, keep, every, best, mode):
    surplus = Retention(keep, every, best, mode=mode).surplus(values)
    assert max(values) not in surplus
    assert set(surplus) <= set(values)
    assert len(values) - len(surplus) >= min(len(values), keep)
    finite = [value for value in values.values() if value is not None and math.isfinite(value)]
    if best and finite:
        kept = [values[step] for step in values.keys() - set(surplus)]
        assert (max if mode == "max" else min)(finite) in kept


def test_what_was_saved_in_place_of_a_bad_milestone_stays_for_good():
    values = dict.fromkeys((40, 52, 60, 100, 110, 120))
    assert Retention(keep=1, keep_every=50).surplus(values) == [40, 60, 110]


def test_of_two_values_the_better_is_the_one_of_the_named_direction():
    assert Retention(mode="max").better(3.0, 5.0) == 5.0
    assert Retention(mode="min").better(3.0, 5.0) == 3.0
    assert Retention(mode="min").better(float("nan"), 5.0) == 5.0
