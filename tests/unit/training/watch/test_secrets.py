"""Records do not tell what is secret in a URL."""

import pytest

from routedvit.training.watch.secrets import without_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:pass@host:81/a.tar", "http://***@host:81/a.tar"),
        ("https://host/{00..11}.tar?sig=a%2Fb&se=1", "https://host/{00..11}.tar?***"),
        ("s3://bucket/train-*.tar", "s3://bucket/train-*.tar"),
        ("s3://bucket/train-0?.tar", "s3://bucket/train-0?.tar"),  # a glob
        ("https://host/a@b.tar", "https://host/a@b.tar"),
        ("shards/who?@home.tar", "shards/who?@home.tar"),
    ],
)
def test_user_password_and_query_go(url, shown):
    assert without_secrets(url) == shown
    assert without_secrets(shown) == shown


def test_everything_in_a_config_and_on_a_command_line_is_looked_at():
    config = {"data": {"train": [{"shards": "http://h/a?t=1", "weight": 1.0}], "val": None}}
    hidden = {"data": {"train": [{"shards": "http://h/a?***", "weight": 1.0}], "val": None}}
    assert without_secrets(config) == hidden
    words = """train.py --set data.train.shards=["http://h/a?t=1","http://u:p@h/b"] --fresh"""
    shown = """train.py --set data.train.shards=["http://h/a?***","http://***@h/b"] --fresh"""
    assert without_secrets(words) == shown
