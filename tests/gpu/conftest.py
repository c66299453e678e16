"""A machine with a GPU may have torch and Triton alone: then the trainer is left out, aloud."""

from importlib.util import find_spec

TRAINER = ("deepspeed", "webdataset", "fsspec", "aiohttp", "simplejpeg")
MISSING = [name for name in TRAINER if find_spec(name) is None]

collect_ignore = ["test_fp16.py", "test_rehearsal.py"] if MISSING else []


def pytest_report_header() -> str | None:
    if not MISSING:
        return None
    return f"not installed: {', '.join(MISSING)}; left out: {', '.join(collect_ignore)}"
