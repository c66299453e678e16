"""The console shows our lines alone; the log holds everything else, also of C and of children.

Each case is a process of its own, since file descriptors 1 and 2 belong to the whole process. The
module is loaded from its file: it needs nothing but the standard library, so that it can act before
the slow imports.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[4] / "routedvit" / "training" / "watch" / "console.py"

PREAMBLE = f"""
import ctypes, importlib.util, os, sys, time, warnings
from pathlib import Path
spec = importlib.util.spec_from_file_location("console", {str(SOURCE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
Console = module.Console
assert "torch" not in sys.modules

class Mistake(ValueError):
    pass
"""


def run(body: str, cwd: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A process that runs `body`, which may use Console and Mistake, in `cwd`."""
    code = PREAMBLE + textwrap.dedent(body)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=cwd, env=buffered, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_only_our_lines_reach_the_console_and_all_else_the_log(tmp_path: Path) -> None:
    result = run(
        """
        with Console(0) as console:
            print("python before the log")
            os.system("echo child before the log")
            console.log_to(Path("logs/rank_0.log"))
            print("python after")
            warnings.warn("a warning")
            ctypes.CDLL(None).puts(b"output of C")
            ctypes.CDLL(None).fflush(None)
            os.system("echo error of a child >&2")
            console.print("our line")
        print("shutdown chatter")
        """,
        tmp_path,
    )
    assert (result.stdout, result.stderr, result.returncode) == ("our line\n", "", 0)
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    for text in (
        "python before the log",
        "child before the log",
        "python after",
        "a warning",
        "output of C",
        "error of a child",
        "shutdown chatter",
    ):
        assert text in log
    assert log.index("python before the log") < log.index("python after")
    assert "our line" not in log


def test_a_second_run_appends_to_the_log(tmp_path: Path) -> None:
    for text in ("first", "second"):
        run(f"with Console(0) as c:\n    c.log_to(Path('log'))\n    print({text!r})", tmp_path)
    log = (tmp_path / "log").read_text()
    assert log.index("first") < log.index("second")


def test_other_ranks_print_nothing(tmp_path: Path) -> None:
    result = run("with Console(1) as console:\n    console.print('hello')", tmp_path)
    assert (result.stdout, result.stderr) == ("", "")


@pytest.mark.parametrize("log", ["", "console.log_to(Path('log'))"])
def test_a_user_error_is_one_line_and_exit_code_2(tmp_path: Path, log: str) -> None:
    result = run(
        f"""
        with Console(0, user_errors=(Mistake,)) as console:
            {log or "pass"}
            raise Mistake("train.lr=-1 is negative; give a positive number")
        """,
        tmp_path,
    )
    assert result.stderr == "error: train.lr=-1 is negative; give a positive number\n"
    assert (result.stdout, result.returncode) == ("", 2)


@pytest.mark.parametrize(
    ("end", "code"), [("raise Mistake('make room')", 2), ("sys.exit(75)", 75), ("pass", 0)]
)
def test_a_full_disk_under_the_log_hides_no_mistake_and_changes_no_exit_code(
    end: str, code: int, tmp_path: Path
) -> None:
    result = run(
        f"""
        with Console(0, user_errors=(Mistake,)) as console:
            console.log_to(Path("log"))
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, 1), os.dup2(full, 2)
            print("lost")
            {end}
        """,
        tmp_path,
    )
    assert ("error: make room\n" in result.stderr) == (code == 2)
    assert result.returncode == code


def test_a_crash_points_to_its_traceback_in_the_log(tmp_path: Path) -> None:
    result = run(
        """
        with Console(0, user_errors=(Mistake,)) as console:
            console.log_to(Path("log"))
            raise RuntimeError("it broke\\nwith many details")
        """,
        tmp_path,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "crashed: RuntimeError: it broke",
        "the full traceback is at the end of log",
    ]
    log = (tmp_path / "log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "with many details" in log


def test_a_crash_before_there_is_a_log_shows_its_traceback(tmp_path: Path) -> None:
    result = run("with Console(0):\n    raise RuntimeError('too early')", tmp_path)
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "too early" in result.stderr


def test_a_segmentation_fault_leaves_its_stack_in_the_log(tmp_path: Path) -> None:
    result = run(
        """
        with Console(0) as console:
            console.log_to(Path("log"))
            os.kill(os.getpid(), 11)
        """,
        tmp_path,
    )
    assert result.returncode == -11
    assert "Segmentation fault" in (tmp_path / "log").read_text()


def test_another_rank_shows_its_error_after_rank_0_had_its_chance(tmp_path: Path) -> None:
    result = run(
        """
        begin = time.monotonic()
        try:
            with Console(1, user_errors=(Mistake,), grace_seconds=0.5) as console:
                raise Mistake("shard 3 is missing")
        finally:
            assert time.monotonic() - begin >= 0.5
        """,
        tmp_path,
    )
    assert result.stderr == "[rank 1] error: shard 3 is missing\n"
    assert result.returncode == 2


def test_a_rank_that_is_told_to_stop_while_it_waits_shows_nothing(tmp_path: Path) -> None:
    result = run(
        """
        import signal, threading
        signal.signal(signal.SIGTERM, lambda *_: None)  # as a trainer that saves on SIGTERM does
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with Console(1, user_errors=(Mistake,), grace_seconds=30) as console:
            raise Mistake("the same mistake on every rank")
        """,
        tmp_path,
    )
    assert (result.stdout, result.stderr, result.returncode) == ("", "", -15)


def test_exit_codes_of_sys_exit_and_of_an_interrupt_are_kept(tmp_path: Path) -> None:
    assert run("with Console(0):\n    sys.exit(75)", tmp_path).returncode == 75
    result = run("with Console(0):\n    raise KeyboardInterrupt", tmp_path)
    assert (result.stdout, result.returncode) == ("interrupted\n", 130)


@pytest.mark.parametrize("options", [[], ["-u"]])
def test_a_console_on_a_full_disk_ends_nothing(options: list[str], tmp_path: Path) -> None:
    """A scheduler's log may lie on the disk of the run, as the log of the rank does."""
    result = run(
        """
        os.symlink("/dev/full", "log")
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        with Console(0) as console:
            console.log_to(Path("log"))
            console.print("lost")
            print("lost too", flush=True)
            Path("done").touch()
        """,
        tmp_path,
        *options,
    )
    assert (tmp_path / "done").exists(), result.stderr
    assert (result.stderr, result.returncode) == ("", 0)


def test_a_console_that_is_not_entered_is_transparent(tmp_path: Path) -> None:
    result = run(
        "c = Console(0)\nc.log_to(Path('log'))\nprint('chatter')\nc.print('ours')", tmp_path
    )
    assert result.stdout == "chatter\nours\n"
    assert not (tmp_path / "log").exists()
