"""What a call wants again stays; what nobody wanted for a while goes."""

from data.recent import PATIENCE, Recent


def test_a_call_that_asks_for_more_than_fits_makes_nothing_twice():
    recent: Recent[int] = Recent(2)
    made: list[int] = []
    for _ in range(3):
        recent.begin_call()
        assert [recent.get(i, lambda i=i: made.append(i) or 10 * i) for i in range(5)] == [
            10 * i for i in range(5)
        ]
    assert made == list(range(5))


def test_the_longest_unused_go_first_and_only_down_to_the_size():
    recent: Recent[str] = Recent(2)
    for name in "abcd":
        recent.begin_call()
        recent.get(name, lambda name=name: name)
    for _ in range(PATIENCE):
        recent.begin_call()
        recent.get("a", lambda: "anew")
    recent.get("e", lambda: "e")
    assert len(recent) == 2
    assert recent.get("a", lambda: "anew") == "a"
    assert recent.get("b", lambda: "anew") == "anew"
