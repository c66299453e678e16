"""The copy of a run: like the run folder, whole at every moment, and of one run."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from routedvit.training.checkpoints.bucket import Bucket, BucketError
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.fetching import CopyUnreachable, check_copy, fetch_run
from routedvit.training.checkpoints.mirror import Mirror, complete
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.base import ConfigError
from tests.unit.training.checkpoints.saving import flip_a_bit, load

pytestmark = pytest.mark.usefixtures("one_writer")


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return Bucket(str(tmp_path / "bucket" / "run"))


class Run:
    """A run folder whose checkpoints are copied."""

    def __init__(self, engine, folder: Path, bucket: Bucket, **retention: object) -> None:
        self.engine, self.folder = engine, folder
        self.told: list[str] = []
        rule = Retention(**{"keep": 2, **retention})
        self.mirror = Mirror(folder, bucket, retention=rule, owner=folder.name, pauses=(0.01,))
        self.checkpoints = Checkpoints(
            folder / "checkpoints", engine, keep=rule, mirror=self.mirror, tell=self.told.append
        )
        self.mirror.begin()

    def save(self, step: int, top1: float | None = None) -> None:
        self.engine.value = step
        state = RunState(step=step, samples_seen=8 * step)
        self.checkpoints.save(state)
        if top1 is not None:
            state.metrics = {"val/top1": top1}
            self.checkpoints.add_evaluation(state)
        self.checkpoints.close()


@pytest.fixture
def run(engine, tmp_path: Path, bucket: Bucket) -> Run:
    return Run(engine, tmp_path / "here" / "run", bucket)


def steps(bucket: Bucket) -> list[int]:
    return [int(name.removeprefix("step_")) for name in complete(bucket.names())]


def test_a_new_machine_goes_on_from_the_copy(run: Run, bucket: Bucket, tmp_path: Path) -> None:
    (run.folder / "logs").mkdir(parents=True)
    (run.folder / "logs" / "rank_0.log").write_text("step 1")
    for step in (10, 20):
        run.save(step, top1=float(step))
    there, told = tmp_path / "there", []
    assert fetch_run(there, bucket, told.append)
    assert told == [f"{there} had no checkpoint; step_00000020 came from {bucket.shown}"]
    state, engine = load(there / "checkpoints")
    assert state is not None
    assert (state.step, engine.value) == (20, 20)
    assert state.metrics == {"val/top1": 20.0}
    assert (there / "logs" / "rank_0.log").read_text() == "step 1"
    assert (there / "checkpoints" / "latest").read_text() == "step_00000020\n"
    assert not (there / "owner.json").exists()


def test_a_run_that_was_never_copied_begins(bucket: Bucket, tmp_path: Path) -> None:
    assert not fetch_run(tmp_path / "there", bucket, print)
    check_copy(tmp_path / "there", bucket, fresh=False, resumes=False)


def test_what_is_here_is_not_overwritten(run: Run, bucket: Bucket, tmp_path: Path) -> None:
    (run.folder / "logs").mkdir(parents=True)
    (run.folder / "logs" / "rank_0.log").write_text("there")
    run.save(10)
    here = tmp_path / "new" / "logs" / "rank_0.log"
    here.parent.mkdir(parents=True)
    here.write_text("here")
    assert fetch_run(tmp_path / "new", bucket, print)
    assert here.read_text() == "here"


def test_the_rule_of_the_run_holds_in_the_copy(engine, tmp_path: Path, bucket: Bucket) -> None:
    run = Run(engine, tmp_path / "run", bucket, keep=1, keep_best=1, keep_every=40)
    for step, top1 in ((10, 3.0), (20, 5.0), (30, 4.0), (40, 4.0), (50, 4.0)):
        run.save(step, top1)
    assert steps(bucket) == [20, 40, 50]


def test_a_new_machine_lets_the_others_stay(engine, tmp_path: Path, bucket: Bucket) -> None:
    run = Run(engine, tmp_path / "run", bucket, keep=1, keep_best=1)
    for step, top1 in ((10, 5.0), (20, 3.0)):
        run.save(step, top1)
    assert fetch_run(tmp_path / "there", bucket, print)
    run = Run(engine, tmp_path / "there", bucket, keep=1, keep_best=1)
    run.save(30, 4.0)
    assert steps(bucket) == [10, 30]


def test_a_checkpoint_without_its_last_file_is_none(
    run: Run, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(10)
    monkeypatch.setattr(bucket, "write", broken)  # a manifest comes by it
    run.save(20)
    assert [part for part in bucket.names() if "step_00000020/shards" in part]
    assert fetch_run(tmp_path / "there", bucket, print)
    assert load(tmp_path / "there" / "checkpoints")[1].value == 10


def broken(*_: object) -> None:
    raise BucketError("bucket: no route")


def test_what_could_not_be_copied_is_told_and_copied_with_the_next(
    run: Run, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as down:
        down.setattr(bucket, "put", broken)
        run.save(10)
        run.save(15)
    behind = "the copy of the run is behind: bucket: no route; the next save or start tries again"
    assert run.told == [behind]
    run.save(20)
    assert steps(bucket) == [15, 20]
    assert run.told == [behind, "the copy of the run is like the run folder again"]


def test_training_does_not_wait_for_the_copy(
    run: Run, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on, put = threading.Event(), bucket.put

    def slow(*args: object) -> None:
        assert going_on.wait(60)
        put(*args)

    monkeypatch.setattr(bucket, "put", slow)
    for step in (10, 20, 30):  # the first is surplus before it is copied
        run.checkpoints.save(RunState(step=step))
    assert run.mirror.wait(0)
    going_on.set()
    run.checkpoints.close()
    assert not run.mirror.wait(0)
    assert steps(bucket) == [20, 30]
    assert run.told == []


def test_after_a_return_the_copy_has_the_new_checkpoint_of_a_step(
    run: Run, bucket: Bucket, tmp_path: Path
) -> None:
    for step in (10, 20):
        run.save(step)
    run.checkpoints.roll_back(before=15, resume_at=200)
    run.checkpoints.close()
    assert steps(bucket) == [10]
    run.checkpoints.save(RunState(step=20, samples_seen=999))
    run.checkpoints.close()
    assert fetch_run(tmp_path / "there", bucket, print)
    state, _ = load(tmp_path / "there" / "checkpoints")
    assert state is not None
    assert state.samples_seen == 999
    jumps = json.loads((tmp_path / "there" / "checkpoints" / "rollbacks.json").read_text())
    assert [jump["to"] for jump in jumps] == [200]


def test_a_step_that_was_saved_anew_while_nobody_copied_replaces_the_old_one(
    run: Run, bucket: Bucket, engine, tmp_path: Path
) -> None:
    for step in (10, 20):
        run.save(step)
    alone = Checkpoints(run.folder / "checkpoints", engine, keep=2)
    alone.roll_back(before=15, resume_at=200)
    alone.save(RunState(step=20, samples_seen=999))
    Run(engine, run.folder, bucket).checkpoints.close()
    assert fetch_run(tmp_path / "there", bucket, print)
    state, _ = load(tmp_path / "there" / "checkpoints")
    assert state is not None
    assert state.samples_seen == 999


def test_a_start_that_goes_back_has_no_later_checkpoints_in_the_copy(
    run: Run, bucket: Bucket
) -> None:
    for step in (10, 20):
        run.save(step)
    run.checkpoints.load_named(Path("step_00000010"))
    assert not run.mirror.wait(60)
    assert steps(bucket) == [10]


def test_a_start_copies_what_the_one_before_it_could_not(run: Run, bucket: Bucket, engine) -> None:
    Checkpoints(run.folder / "checkpoints", engine, keep=2).save(RunState(step=10))
    run.checkpoints.load_newest()
    assert not run.mirror.wait(60)
    assert steps(bucket) == [10]


@pytest.mark.parametrize("damage", ["bits", "manifest"])
def test_a_damaged_copy_is_named_and_the_one_before_it_taken(
    run: Run, bucket: Bucket, tmp_path: Path, damage: str
) -> None:
    for step in (10, 20):
        run.save(step)
    place = tmp_path / "bucket" / "run" / "checkpoints" / "step_00000020"
    if damage == "bits":
        flip_a_bit(place)
    else:
        (place / "manifest.json").write_text("{")
    told: list[str] = []
    assert fetch_run(tmp_path / "there", bucket, told.append)
    assert "step_00000020" in told[0]
    assert "is damaged" in told[0]
    assert load(tmp_path / "there" / "checkpoints")[1].value == 10
    flip_a_bit(place.with_name("step_00000010"))
    with pytest.raises(ConfigError, match=r"all 2 checkpoints in .* are damaged"):
        fetch_run(tmp_path / "elsewhere", bucket, told.append)


def test_a_store_that_does_not_answer_is_no_new_beginning(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "names", broken)
    with pytest.raises(CopyUnreachable, match=r"no route.*no checkpoint of its own") as caught:
        fetch_run(tmp_path / "there", bucket, print)
    assert caught.value.exit_code == 1  # which schedulers try again


def test_an_older_start_leaves_the_copy_to_the_newer(
    run: Run, bucket: Bucket, engine, tmp_path: Path
) -> None:
    run.save(10)
    assert fetch_run(tmp_path / "there", bucket, print)
    newer = Run(engine, tmp_path / "there", bucket)
    newer.save(20)
    run.save(30)
    assert steps(bucket) == [10, 20]
    assert run.told == [f"a newer start copies to {bucket.shown}; this one no longer does"]
    run.save(40)
    assert len(run.told) == 1


def test_a_folder_that_the_run_has_left_behind_is_refused(
    run: Run, bucket: Bucket, engine, tmp_path: Path
) -> None:
    run.save(10)
    assert fetch_run(tmp_path / "there", bucket, print)
    Run(engine, tmp_path / "there", bucket).save(20)
    with pytest.raises(ConfigError, match=r"ends at step_00000010.*--resume step_00000010"):
        check_copy(run.folder, bucket, fresh=False, resumes=False)
    check_copy(run.folder, bucket, fresh=False, resumes=True)


def test_a_return_that_the_copy_has_not_heard_of_is_no_folder_left_behind(
    run: Run, bucket: Bucket, engine
) -> None:
    for step in (10, 20):
        run.save(step)
    Checkpoints(run.folder / "checkpoints", engine, keep=2).roll_back(before=15, resume_at=200)
    check_copy(run.folder, bucket, fresh=False, resumes=False)


def test_the_copy_of_another_run_is_not_overwritten(
    run: Run, bucket: Bucket, engine, tmp_path: Path
) -> None:
    run.save(10)
    with pytest.raises(ConfigError, match=r"copy of an earlier run.*--fresh does not move"):
        check_copy(run.folder, bucket, fresh=True, resumes=False)
    other = tmp_path / "other"
    Checkpoints(other / "checkpoints", engine, keep=2).save(RunState(step=30))
    with pytest.raises(ConfigError, match="copy of another run"):
        check_copy(other, bucket, fresh=False, resumes=False)


def test_a_path_may_be_given_as_a_url(tmp_path: Path) -> None:
    Bucket(f"file://{tmp_path}/new/run").write("a/b", b"c")
    assert (tmp_path / "new" / "run" / "a" / "b").read_bytes() == b"c"


def test_a_url_that_nobody_can_serve_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror: nowhere://bucket/runs: .*nowhere"):
        Bucket("nowhere://bucket/runs")
