"""A large block that was freed is there again without page faults."""

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from routedvit.training.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(50):  # the first ones move between neighbouring blocks
    before = faults()
    torch.ones(4 * 2**20)  # 16 MiB, 4,096 pages
print(faults() - before)
"""


def faults_of(kind: str, **environment: str) -> int:
    ended = subprocess.run(
        [sys.executable, "-c", FAULTS, kind],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(ended.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    assert faults_of("kept") < 100
    assert faults_of("kept", MALLOC_MMAP_THRESHOLD_="1000000") > 1000
