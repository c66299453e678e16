"""With which code and packages a run was made, for its records."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path


def git_revision() -> str | None:
    """Commit of the checkout that runs, with '+' if it is modified; None outside git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    try:
        commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if status.strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python and of every package that can change a run's numbers."""
    names = ("torch", "torchvision", "timm", "deepspeed", "triton", "webdataset", "numpy", "pillow")
    installed = {(dist.name or "").lower() for dist in metadata.distributions()}
    found = {name: metadata.version(name) for name in names if name in installed}
    return {"python": platform.python_version(), **found}
