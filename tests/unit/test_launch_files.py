"""What launch/ ships is well formed, agrees with itself and with train.py."""

from __future__ import annotations

import copy
import getpass
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deepspeed.launcher.runner import fetch_hostfile

from routedvit.training.distributed.signals import NODE_LAUNCHERS, REQUEUE_EXIT_CODE
from routedvit.training.watch.console import USER_ERROR_CODE

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
KUBERNETES = "1.37"  # successPolicy became stable in 1.33


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / "train.yaml").read_text()))


@pytest.fixture(scope="module")
def objects(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The objects of train.yaml by kind; of claims there are several."""
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def claims(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The claims of train.yaml by name."""
    found = [document for document in documents if document["kind"] == "PersistentVolumeClaim"]
    return {claim["metadata"]["name"]: claim for claim in found}


@pytest.fixture(scope="module")
def job(objects: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = objects["Job"]["spec"]
    return spec


@pytest.fixture(scope="module")
def container(job: dict[str, Any]) -> dict[str, Any]:
    [only] = job["template"]["spec"]["containers"]
    return only  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def environment(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container["env"]}


def validate(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_every_object_is_valid(objects: dict[str, Any], documents: list[dict[str, Any]]) -> None:
    assert objects.keys() == {"Service", "PersistentVolumeClaim", "Job"}
    for document in documents:
        validate(document)


def test_the_schema_would_notice(objects: dict[str, Any]) -> None:
    broken = copy.deepcopy(objects["Job"])
    broken["spec"]["completionsMode"] = broken["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(broken)


def test_as_many_pods_as_machines(job: dict[str, Any], environment: dict[str, str]) -> None:
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == int(environment["NODES"])


def test_pod_0_is_found_through_the_service(
    objects: dict[str, Any], job: dict[str, Any], environment: dict[str, str]
) -> None:
    service, name = objects["Service"], objects["Job"]["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert job["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert environment["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert environment["MASTER_PORT"] == str(service["spec"]["ports"][0]["port"])


def test_one_process_for_each_gpu(container: dict[str, Any], environment: dict[str, str]) -> None:
    assert environment["GPUS"] == container["resources"]["limits"]["nvidia.com/gpu"]


def test_exit_codes_mean_what_train_py_means(job: dict[str, Any], container: Any) -> None:
    rules = job["podFailurePolicy"]["rules"]
    actions = {tuple(r["onExitCodes"]["values"]): r["action"] for r in rules if "onExitCodes" in r}
    assert actions == {(REQUEUE_EXIT_CODE,): "Ignore", (USER_ERROR_CODE,): "FailJob"}
    names = {r["onExitCodes"]["containerName"] for r in rules if "onExitCodes" in r}
    assert names == {container["name"]}
    # Kubernetes refuses a failure policy without these two
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["podReplacementPolicy"] == "Failed"


def test_every_volume_is_there_and_runs_are_shared(
    claims: dict[str, Any], job: dict[str, Any], container: dict[str, Any]
) -> None:
    volumes = {volume["name"]: volume for volume in job["template"]["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    asked = [volume.get("persistentVolumeClaim") for volume in volumes.values()]
    assert [claim["claimName"] for claim in asked if claim] == list(claims)
    for claim in claims.values():
        assert claim["spec"]["accessModes"] in (["ReadWriteMany"], ["ReadOnlyMany"])
    runs = claims[volumes["runs"]["persistentVolumeClaim"]["claimName"]]
    assert runs["spec"]["accessModes"] == ["ReadWriteMany"]
    assert mounts["runs"] == f"{container['workingDir']}/runs"
    assert mounts["shm"] == "/dev/shm"
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_the_shards_of_the_config_are_mounted(container: dict[str, Any]) -> None:
    """The image holds none: .dockerignore leaves them out."""
    run = json.loads((ROOT / container["command"][-1]).read_text())
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for split in ("train", "val"):
        place = Path(container["workingDir"], run["data"][split]["shards"])
        assert any(place.is_relative_to(mount) for mount in mounts), place


def test_a_core_for_each_loader_process(container: dict[str, Any]) -> None:
    run = json.loads((ROOT / container["command"][-1]).read_text())
    resources = container["resources"]
    gpus = int(resources["limits"]["nvidia.com/gpu"])
    assert int(resources["requests"]["cpu"]) >= gpus * run["data"]["num_workers"]


@pytest.mark.parametrize(
    ("chosen", "extras"),
    [([], "train,quickstart"), (["EXTRAS=s3,gs"], "train,quickstart,s3,gs")],
)
def test_an_environment_has_the_extras_that_are_asked_for(chosen: list[str], extras: str) -> None:
    command = ["make", "-n", "-W", "pyproject.toml", "env", *chosen]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert f"-e '.[{extras}]'" in said


def test_an_image_reads_buckets() -> None:
    lines = (LAUNCH / "kubernetes" / "Dockerfile").read_text().splitlines()
    assert "ARG EXTRAS=s3,gs" in lines
    assert any(line.startswith('RUN make env EXTRAS="$EXTRAS"') for line in lines)


def test_slurm_warns_before_a_limit_that_there_is() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = dict(x.removeprefix("#SBATCH ").partition("=")[::2] for x in lines if "SBATCH -" in x)
    assert options["--signal"].startswith("B:USR1@")
    assert re.fullmatch(r"\d+-\d\d:\d\d:\d\d", options["--time"])
    # those of a cluster are only shown
    assert {"##SBATCH --account", "##SBATCH --partition"} <= options.keys()


def test_the_command_names_files_that_exist(container: dict[str, Any]) -> None:
    files = [word for word in container["command"] if "." in word]
    assert files
    assert [word for word in files if not (ROOT / word).is_file()] == []
    assert "launch/node.sh" in NODE_LAUNCHERS


def test_deepspeed_reads_the_hostfile() -> None:
    assert fetch_hostfile(str(LAUNCH / "hostfile")) == {"node1": 8, "node2": 8}


def test_every_line_of_the_environment_file_is_a_setting() -> None:
    """DeepSpeed's parser fails on a blank line and on a comment."""
    for line in (LAUNCH / "deepspeed_env").read_text().splitlines():
        assert re.fullmatch(r"[A-Z0-9_]+=\S+", line), line


def test_shards_are_cached_on_the_disk_of_the_machine(environment: dict[str, str]) -> None:
    """By default they would fill a home that all machines share, or the layer of a container."""
    assert environment["ROUTEDVIT_CACHE"].startswith("/cache/")
    lines = (LAUNCH / "deepspeed_env").read_text().splitlines()
    assert "ROUTEDVIT_CACHE=/tmp/routedvit-$USER/shards" in lines


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({}, f"/tmp/routedvit-{getpass.getuser()}/shards"),
        ({"SLURM_TMPDIR": "/job"}, "/job/shards"),
        ({"SLURM_TMPDIR": "/job", "ROUTEDVIT_CACHE": "/disk"}, "/disk"),
    ],
)
def test_slurm_caches_shards_where_the_job_may(given: dict[str, str], folder: str) -> None:
    script = (LAUNCH / "slurm.sbatch").read_text()
    [line] = [line for line in script.splitlines() if "ROUTEDVIT_CACHE=" in line]
    told = subprocess.run(
        ["bash", "-euc", f'{line}; echo "$ROUTEDVIT_CACHE"'],
        env={"PATH": "/usr/bin:/bin", **given}, capture_output=True, text=True,
    )  # fmt: skip
    assert told.stdout.strip() == folder


def test_nothing_imports_launch() -> None:
    assert list(LAUNCH.rglob("*.py")) == []


@pytest.mark.parametrize("script", ["slurm.sbatch", "node.sh"])
def test_shellcheck_finds_nothing(script: str) -> None:
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert shellcheck is not None
    command = [shellcheck, "--format", "json", "--shell", "bash", LAUNCH / script]
    found = subprocess.run(command, capture_output=True, text=True).stdout
    assert json.loads(found) == []


@pytest.fixture
def node() -> Any:
    """Runs launch/node.sh with a shell command as every rank; returns the exit code."""

    def run(command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", LAUNCH / "node.sh", "bash", "-c", command],
            env={
                "PATH": "/usr/bin:/bin", "NODES": "3", "NODE_RANK": "1", "GPUS": "2",
                "MASTER_ADDR": "pod-0.pods", "MASTER_PORT": "29500", **settings,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )  # fmt: skip

    return run


def test_each_rank_knows_its_place(node: Any) -> None:
    line = "echo $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT"
    result = node(line)
    assert result.returncode == 0
    assert sorted(result.stdout.splitlines()) == [
        "2 0 6 pod-0.pods:29500",
        "3 1 6 pod-0.pods:29500",
    ]


@pytest.mark.parametrize("code", [REQUEUE_EXIT_CODE, USER_ERROR_CODE, 1])
def test_the_first_failure_ends_the_node_with_its_code(node: Any, code: int) -> None:
    result = node(f"[ $LOCAL_RANK = 1 ] && exit {code}; exec sleep 50")
    assert result.returncode == code


def test_a_missing_setting_is_named(node: Any) -> None:
    result = node("true", MASTER_ADDR="")
    assert result.returncode != 0
    assert "MASTER_ADDR: name of machine 0" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("rank", "code"),
    [
        ("exec sleep 50", REQUEUE_EXIT_CODE),  # as Python is before it listens
        (f"trap 'exit {USER_ERROR_CODE}' USR1; sleep 50 & wait", USER_ERROR_CODE),
    ],
)
def test_a_signal_that_nobody_listened_to_stops_the_node_as_one_that_was_heard(
    number: int, rank: str, code: int
) -> None:
    process = subprocess.Popen(
        ["bash", LAUNCH / "node.sh", "bash", "-c", f"echo up; {rank}"],
        env={
            "PATH": "/usr/bin:/bin", "NODES": "1", "NODE_RANK": "0", "GPUS": "2",
            "MASTER_ADDR": "pod-0.pods", "MASTER_PORT": "29500",
        },
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(timeout=40) == code


def test_a_rank_that_dies_of_a_signal_unasked_is_a_failure(node: Any) -> None:
    assert node("[ $LOCAL_RANK = 1 ] && kill -USR1 $$; exec sleep 50").returncode == 138
