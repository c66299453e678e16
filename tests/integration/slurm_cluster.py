"""A Slurm cluster of two machines, which are the namespaces of two_hosts.py: the real daemons.

munged and slurmd run on both, slurmctld on node1. Accounting and cgroups are left out; each machine
has one GPU in the books (whose device is /dev/null), so that the script's own directives hold.

    with slurm_cluster(folder) as cluster:
        job = cluster.sbatch(["launch/slurm.sbatch", "configs/vit_b.json"], cwd=ROOT)
        cluster.wait_for(job, "COMPLETED")
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration import two_hosts
from tests.integration.two_hosts import Host

INSTALL = "apt install slurm-wlm munge"

# Jobs of the partition `urgent` send those of `normal` back into the queue, after a time of grace.
SLURM_CONF = """\
ClusterName=routedvit
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=20
KillWait=20
MinJobAge=600
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
NodeName=node1 NodeAddr=192.0.2.1 CPUs=2 Gres=gpu:1 State=UNKNOWN
NodeName=node2 NodeAddr=192.0.2.2 CPUs=2 Gres=gpu:1 State=UNKNOWN
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""

MUNGED = [
    "munged", "--force", "--key-file", "{folder}/munge.key", "--socket", "/run/munge.socket",
    "--pid-file", "/run/munge.pid", "--seed-file", "/run/munge.seed",
    "--log-file", "/run/munge.log", "--num-threads", "2",
]  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Commands are typed on node1."""

    node1: Host
    node2: Host
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def sbatch(
        self, command: Sequence[object], *, cwd: Path, env: Mapping[str, str] | None = None
    ) -> str:
        """Submit a script with its arguments; the job's number."""
        words = ["sbatch", "--parsable", *map(str, command)]
        return self._run(words, cwd=cwd, env=env or os.environ).strip()

    def run(self, *command: object) -> str:
        """`scancel`, `scontrol` and the like."""
        return self._run(list(map(str, command)), cwd=self.folder, env=os.environ)

    def state(self, job: str) -> str:
        """Of squeue: PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, ..."""
        return self.run("squeue", "--noheader", "--states=all", "--job", job, "--format=%T").strip()

    def exit_code(self, job: str) -> int:
        """Of the batch script."""
        record = self.run("scontrol", "show", "job", job)
        return int(record.partition("ExitCode=")[2].partition(":")[0])

    def restarts(self, job: str) -> int:
        """How often it went back into the queue."""
        record = self.run("scontrol", "show", "job", job)
        return int(record.partition("Restarts=")[2].split()[0])

    def hurry(self, job: str) -> None:
        """Let a job that waits start now. It is to be asked again: once the job has left its
        machines, Slurm sets the time anew, two minutes later. One that has started stays so.
        """
        command = ["scontrol", "update", f"jobid={job}", "starttime=now"]
        self.node1.start(command, cwd=self.folder, env=os.environ | self.environment).communicate()

    def wait_for(self, job: str, *states: str, seconds: float = 120) -> str:
        """The first of these states that the job is in."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}\n{self.run('sinfo', '-N')}"
            time.sleep(0.2)
        return state

    def _run(self, command: list[str], *, cwd: Path, env: Mapping[str, str]) -> str:
        process = self.node1.start(command, cwd=cwd, env=dict(env) | self.environment)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0, printed
        return printed


def what_is_missing() -> str | None:
    """Why there can be no cluster here, with the mend; None if there can."""
    if absent := [x for x in ("slurmctld", "slurmd", "munged") if shutil.which(x) is None]:
        return f"a Slurm cluster needs {', '.join(absent)}: {INSTALL}"
    return two_hosts.what_is_missing()


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons and wait until both machines are idle."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(folder=folder))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    environment = {"SLURM_CONF": str(conf)}
    with two_hosts.two_hosts(folder / "hosts") as (node1, node2):
        cluster = Cluster(node1, node2, folder, environment)
        for host in (node1, node2):
            host.run([word.format(folder=folder) for word in MUNGED])
        node1.run(["slurmctld", "-f", conf])
        for host in (node1, node2):
            start_node(cluster, host)
        _wait_until_idle(cluster)
        yield cluster


def start_node(cluster: Cluster, host: Host) -> None:
    """slurmd, as at the boot of a machine."""
    host.run(["mkdir", "-p", "/run/slurmd"])
    host.run(["slurmd", "-f", cluster.environment["SLURM_CONF"], "-N", host.name])


def _wait_until_idle(cluster: Cluster, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while (states := cluster.run("sinfo", "-N", "--noheader", "-p", "normal", "--format=%T")) != (
        "idle\nidle\n"
    ):
        assert time.monotonic() < deadline, f"{states}, see {cluster.folder}/*.log"
        time.sleep(0.2)
