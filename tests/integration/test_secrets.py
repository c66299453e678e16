"""A run whose shards stand behind a password tells it to nobody who reads its folder."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.integration.launching import ROOT
from tests.integration.short_run import short_run

SECRETS = ("PASSWORD", "TOKEN")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server for the files in `tmp_path`."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{found.server_port}"
        found.shutdown()


def test_neither_records_nor_logs_tell_a_password_or_a_token(server: str, tmp_path: Path) -> None:
    run = short_run(tmp_path, steps=2) | {"output_dir": str(tmp_path / "run")}
    (tmp_path / "run.json").write_text(json.dumps(run))
    shards = f"http://me:PASSWORD@{server}/shards/train/manifest.json?token=TOKEN"
    command = [sys.executable, "train.py", "--config", str(tmp_path / "run.json")]
    override = ["--set", f"data.train.shards={shards}"]
    done = start([*command, *override])
    assert done.returncode == 0, done.stderr
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in written)
    assert any(path.name == "run_state.json" for path in written)
    telling = [path for path in written if any(s.encode() in path.read_bytes() for s in SECRETS)]
    assert not telling
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS)

    record = str(tmp_path / "run" / "config.json")
    again = start([sys.executable, "train.py", "--config", record])
    assert again.returncode == 2
    assert "data.train.shards" in again.stderr + again.stdout
    assert "give the URL again" in again.stderr + again.stdout


def start(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
