"""Runs `train.py` once per line of arguments, forked from one process that has imported it.

Importing torch, timm and deepspeed takes most of the time of a run that ends in a mistake.

    python fork_train.py < arguments.json > results.json        [[...], ...] -> [[code, text], ...]
"""

import json
import os
import sys
import tempfile

import train


def run(arguments: list[str]) -> tuple[int, str]:
    """Exit code of `train.py arguments`, and what it printed on both streams."""
    with tempfile.TemporaryFile() as printed:
        pid = os.fork()
        if pid == 0:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            sys.argv = ["train.py", *arguments]
            sys.exit(train.main())
        _, status = os.waitpid(pid, 0)
        printed.seek(0)
        return os.waitstatus_to_exitcode(status), printed.read().decode()


if __name__ == "__main__":
    results = [run(arguments) for arguments in json.load(sys.stdin)]
    json.dump(results, sys.stdout)
