"""An HTTP server that misbehaves on request; a real socket, so real clients meet real faults."""

from __future__ import annotations

import http.server
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves `root`. faults['name'] is a list of what the next requests for that file get."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: list[tuple[str, str | None]] = []  # (file name, Range header)
        self.ranges = True
        self.tells_size = True  # in answers about a part of a file
        self.credentials: str | None = None  # the Authorization that is asked for
        self.query: str | None = None  # what must stand behind every URL, a token for instance
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are what the tests are about."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FaultyServer
    range = ""  # what Content-Range says

    def do_GET(self) -> None:
        asked_for = urlsplit(self.path)  # whole URLs come to a proxy
        path = self.server.root / unquote(asked_for.path).lstrip("/")
        self.server.requests.append((path.name, self.headers["Range"]))
        if self.server.credentials not in (None, self.headers["Authorization"]):
            return self.send_error(401)
        if self.server.query not in (None, asked_for.query):
            return self.send_error(403)
        faults = self.server.faults[path.name]
        fault = faults.pop(0) if faults else "none"
        if path.is_dir():
            links = "".join(f'<a href="{quote(e.name)}">x</a>' for e in path.iterdir())
            return self.answer(200, (links + '<a href="http://other/x.tar">x</a>').encode(), fault)
        if fault.isdecimal() or not path.is_file():
            return self.send_error(int(fault) if fault.isdecimal() else 404)
        content, status = path.read_bytes(), 200
        size = len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked and self.server.ranges:
            begin, end = int(asked[1]), int(asked[2]) + 1 if asked[2] else size
            content, status = content[begin:end], 206
            self.range = f"{begin}-{end - 1}/{size}"
            if begin >= size:
                content, status, self.range = b"", 416, f"*/{size}"
        return self.answer(status, content, fault)

    def do_HEAD(self) -> None:
        """As a store answers that is asked for the size of an object."""
        path = self.server.root / self.path.lstrip("/")
        self.send_response(200 if path.is_file() else 404)
        self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
        self.end_headers()

    def answer(self, status: int, content: bytes, fault: str) -> None:
        half = len(content) // 2
        if fault == "swapped":
            content = bytes(reversed(content))
        claimed = {"short": half, "long": len(content) + 100}.get(fault, len(content))
        self.send_response(status)
        self.send_header("Content-Length", str(claimed))
        if self.range and self.server.tells_size:
            self.send_header("Content-Range", f"bytes {self.range}")
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        if fault.startswith("drip"):  # so many bytes, each after a little wait
            for byte in range(int(fault.removeprefix("drip"))):
                self.wfile.write(content[byte : byte + 1])
                time.sleep(0.01)
            fault = "reset"
            content = b""
        if fault == "slow":
            self.wfile.write(content[:half])
            time.sleep(0.8)
            content, claimed = content[half:], claimed - half
        self.wfile.write(content[: half if fault in ("reset", "stall", "truncate") else claimed])
        self.wfile.flush()
        if fault == "stall":
            time.sleep(3)
        if fault == "reset":  # SO_LINGER 0 turns the close into a TCP reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Silent."""
