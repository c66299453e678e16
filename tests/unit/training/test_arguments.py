"""Options of `train.py` that nothing would read are refused: what was meant is another call."""

import sys

import pytest

from routedvit.training.arguments import parse_arguments


def parse(monkeypatch: pytest.MonkeyPatch, line: str):
    monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
    return parse_arguments("about")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--config c --world-size 8", "--world-size is read by --dry-run and --find-batch only"),
        ("--config c --gpu-memory 40", "--gpu-memory is read by --dry-run and --find-batch only"),
        ("--config c --world-size 0", "--world-size is read by"),
        ("--config c --dry-run --fresh", "--dry-run does not read --fresh; leave out one of them"),
        ("--config c --find-batch --resume x", "--find-batch does not read --resume"),
        ("--config c --dry-run --evaluate latest", "--dry-run does not read --evaluate"),
        ("--config c --export best --world-size 2", "--export does not read --world-size"),
        ("--config c --evaluate latest --fresh", "--evaluate does not read --fresh"),
        ("--config c --export best --resume x", "--export does not read --resume"),
        ("--keys --set optim.lr=1", "--keys does not read --set"),
        ("--write-schema f --dry-run", "--write-schema does not read --dry-run"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(monkeypatch, line)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "--config c --set a=1 --fresh --resume x --local_rank=0",
        "--config c --set a=1 --dry-run --find-batch --world-size 8 --gpu-memory 40",
        "--config c --find-batch --world-size 8",
        "--config c --set a=1 --evaluate latest --local_rank=3",
        "--config c --set a=1 --export best",
        "--keys",
        "--write-schema f",
    ],
)
def test_options_that_are_read_pass(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    assert parse(monkeypatch, line)
