"""Two hosts on one machine: namespaces of Linux, joined by a wire, each with its own sshd.

A host has its own network, hostname, process table and mounts, and shares the files of the machine
as machines of a cluster share a file system. It lives as long as its first process: killing that
one is a power cut, and nothing is left behind when the test dies.

    with two_hosts(folder) as (node1, node2):
        node1.start(["ssh", "node2", "hostname"], cwd=folder)

The addresses are of TEST-NET-1 (RFC 5737) and exist inside the two namespaces only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = {"node1": "192.0.2.1", "node2": "192.0.2.2"}
ENTER = ["nsenter", "--net", "--uts", "--mount", "--pid", "--target"]
UNSHARE = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
INSTALL = "apt install openssh-server pdsh iproute2"

# The first process of a host, which ends when the test does: its standard input closes then. What
# it mounts is seen by its own host only.
INIT = """
set -e
hostname $NAME
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount --bind $FOLDER/hosts /etc/hosts
mount --bind $FOLDER/ssh_config /etc/ssh/ssh_config
/usr/sbin/sshd -f $FOLDER/sshd_config -E $FOLDER/sshd_$NAME.log
echo up
exec cat
"""

SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
PidFile none
"""

SSH_CONFIG = """\
Host *
  IdentityFile {folder}/user_key
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
  PasswordAuthentication no
  ServerAliveInterval 5
  ServerAliveCountMax 3
"""


@dataclass(frozen=True)
class Host:
    """One of the two; `pid` is its first process, seen from outside."""

    name: str
    address: str
    pid: int

    def start(
        self, command: Sequence[object], *, cwd: Path, env: Mapping[str, str] = os.environ
    ) -> subprocess.Popen[str]:
        """Run a command on this host; stderr comes with stdout."""
        shell = ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd)]
        return subprocess.Popen(
            [*ENTER, str(self.pid), *shell, *map(str, command)],
            env=dict(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: Sequence[object], *, cwd: Path = Path("/")) -> str:
        """Run a short command to its end and return what it printed."""
        process = self.start(command, cwd=cwd)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        return output

    def cut_power(self) -> None:
        """No more packets, and every process ends at once, without a word to anybody."""
        self.run(["ip", "link", "set", "eth0", "down"])
        self.kill()

    def kill(self) -> None:
        """End every process at once; the system still closes their connections."""
        os.kill(self.pid, signal.SIGKILL)


def what_is_missing() -> str | None:
    """Why two hosts cannot be started here, with the mend; None if they can."""
    if os.geteuid() != 0:
        return "two hosts need root, for namespaces and sshd"
    programs = ("ip", "nsenter", "unshare", "ssh", "ssh-keygen", "pdsh", "/usr/sbin/sshd")
    if absent := [name for name in programs if shutil.which(name) is None]:
        return f"two hosts need {', '.join(absent)}: {INSTALL}"
    trial = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "eth0", "type", "veth"], capture_output=True
    )
    return None if trial.returncode == 0 else f"no network namespaces here: {trial.stderr.decode()}"


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Start node1 and node2; keys and settings go into `folder`, on which both agree."""
    _write_settings(folder)
    with ExitStack() as running:
        # The wire outlives a host that dies, as a switch does: else its peer would lose the address
        cards = [running.enter_context(_process(["unshare", "--net", "cat"])) for _ in ADDRESSES]
        for card in cards:
            _wait_until(lambda card=card: _network(card.pid) != _network(os.getpid()))
        first, second = (f"nsenter --target {card.pid} --net ip" for card in cards)
        _shell(f"{first} link add eth0 type veth peer name eth0 netns {cards[1].pid}")
        for ip, address in ((first, "192.0.2.1"), (second, "192.0.2.2")):
            _shell(f"{ip} address add {address}/24 dev eth0")
            _shell(f"{ip} link set lo up")
            _shell(f"{ip} link set eth0 up")
        hosts = []
        for name, card in zip(ADDRESSES, cards, strict=True):
            boot = ["nsenter", "--target", str(card.pid), "--net", *UNSHARE, "bash", "-c", INIT]
            unshare = running.enter_context(_process(boot, NAME=name, FOLDER=str(folder)))
            assert unshare.stdout is not None
            line = unshare.stdout.readline()
            assert line == "up\n", line + unshare.stdout.read()
            hosts.append(Host(name, ADDRESSES[name], _child(unshare.pid)))
        yield hosts[0], hosts[1]


@contextmanager
def _process(command: list[str], **env: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed at the end."""
    process = subprocess.Popen(
        command,
        env=os.environ | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _write_settings(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("host_key", "user_key"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
        subprocess.run(key, check=True)
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{name} {host_key}" for name in ADDRESSES))
    names = [f"{address} {name}" for name, address in ADDRESSES.items()]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))


def _child(pid: int) -> int:
    """The process that `unshare --fork` has started."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _network(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "a namespace did not start"
        time.sleep(0.01)


def _shell(command: str) -> None:
    subprocess.run(command.split(), check=True)
