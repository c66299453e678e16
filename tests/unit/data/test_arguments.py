"""A number out of range on a command line is refused by the name of its option."""

from __future__ import annotations

import pytest

from data import check, order_cli, write

WRITE = ["--source", "mnist", "--out", "nowhere"]
ORDER = ["--shards", "nowhere", "--steps", "0:1"]


@pytest.mark.parametrize(
    ("command", "given", "option", "value"),
    [
        (write, WRITE, "--resize", "0"),
        (write, WRITE, "--resize", "-3"),
        (write, WRITE, "--jobs", "0"),
        (write, WRITE, "--shard-size", "0"),
        (write, WRITE, "--shard-size", "many"),
        (write, WRITE, "--quality", "101"),
        (write, WRITE, "--held-out", "1"),
        (write, WRITE, "--held-out", "nan"),
        (write, WRITE, "--held-out", "some"),
        (write, WRITE, "--max-skipped", "-0.1"),
        (check, ["nowhere"], "--jobs", "0"),
        (order_cli, ORDER, "--batch-size", "0"),
        (order_cli, ORDER, "--world-size", "0"),
        (order_cli, ORDER, "--rank", "-1"),
        (order_cli, ORDER, "--seed", "-1"),
        (order_cli, ORDER, "--seed", str(1 << 64)),  # as in the config
        (order_cli, ORDER, "--repeats", "0"),
        (order_cli, ORDER, "--micro-batch-size", "0"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(capsys, command, given, option, value):
    with pytest.raises(SystemExit) as stopped:
        command.main([*given, f"{option}={value}"])
    assert stopped.value.code == 2
    assert f"error: argument {option}: '{value}'" in capsys.readouterr().err
