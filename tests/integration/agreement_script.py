"""Two ranks on one machine: what each is told when the machines of a run differ.

python agreement_script.py FOLDER      writes FOLDER/report.json: {case: [rank 0's, rank 1's]}
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

from routedvit.training.config.run import ConfigError
from routedvit.training.distributed.agreement import check_same_run, check_shared_folder
from routedvit.training.distributed.collective import RankFailed, on_rank_zero, together

CONFIG = {"optim": {"lr": 0.1, "betas": (0.9, 0.95)}, "seed": 0}


class Mistake(ValueError):
    exit_code = 7


def told(check: Callable[[], object]) -> str:
    try:
        check()
    except (ConfigError, Mistake) as error:
        return f"{error}, exit code {getattr(error, 'exit_code', 2)}"
    except (RankFailed, OSError, json.JSONDecodeError) as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def fails(rank: int, on: int, error: Exception) -> str:
    if rank == on:
        raise error
    return "fine"


def work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = folder / str(rank)
    (own / "data").mkdir(parents=True)
    (own / "data" / "order.py").write_text(f"rank = {rank}")
    (folder / "run").mkdir(exist_ok=True)
    fails_on = functools.partial(fails, rank)
    mistake = Mistake("teacher: no such file")
    cases: dict[str, Callable[[], object]] = {
        "same": lambda: check_same_run(CONFIG, "x", []),
        "config": lambda: check_same_run(CONFIG | {"seed": rank}, "x", []),
        "data": lambda: check_same_run(CONFIG, f"{4 - rank} samples", []),
        "code": lambda: check_same_run(CONFIG, "x", [own / "data"]),
        "shared": lambda: check_shared_folder(folder / "run"),
        "not shared": lambda: check_shared_folder(own, seconds=0.5),
        "damaged": lambda: on_rank_zero(lambda: json.loads("{,}")),
        "refused": lambda: on_rank_zero(lambda: fails_on(0, ConfigError("another run"))),
        "all built": lambda: together(lambda: fails_on(9, mistake)),
        "mistake": lambda: together(lambda: fails_on(1, mistake), (Mistake,)),
        "same mistake": lambda: together(lambda: fails_on(rank, mistake), (Mistake,)),
        "crash": lambda: together(lambda: fails_on(1, OSError("disk fails\nmore"))),
    }
    answers = [None, None]
    for name, check in cases.items():
        dist.all_gather_object(answers, told(check))
        if rank == 0:
            report[name] = list(answers)
    if rank == 0:
        (folder / "report.json").write_text(json.dumps(report))
    dist.destroy_process_group()


report: dict[str, list[str]] = {}

if __name__ == "__main__":
    # forked: imports are most of the time
    mp.start_processes(work, args=(Path(sys.argv[1]),), nprocs=2, start_method="fork")
