"""Where a run goes on from, and what a rollback forgets, also when it is interrupted."""

from __future__ import annotations

from pathlib import Path

from actors.buffer import Group
from actors.measurement import describe_sample
from actors.run_files import Branch, RunFiles, next_branch
from raylign.rewards.outcomes import Rejection, reject
from raylign.training.batches import LearnerBatch
from raylign.training.checkpoints import Checkpoint, commit, name_step
from tests.training.test_batches import make_batch, same


def save(files: RunFiles, step: int) -> None:
    """A checkpoint without a learner."""
    draft = files.checkpoints / f".{name_step(step)}.partial"
    draft.mkdir(parents=True)
    books = {"trained": 10 * step, "dropped": {}}
    progress = {"step": step, "ledger": books}
    commit(draft, files.checkpoints, Checkpoint(step, {}, progress, 1, {}))


def test_a_run_goes_on_from_its_newest_checkpoint_and_the_batches_after_it(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    start = files.find_start()
    assert (start.checkpoint, start.step, start.batches, start.branch) == (None, 0, [], Branch())
    for step in range(5):
        files.batches.write(make_batch(step))
    save(files, 2)
    save(files, 4)
    files.forget_covered()
    assert [batch.step for batch in files.batches.read_from(2)] == [2, 3, 4]
    start = files.find_start()
    assert start.checkpoint == files.checkpoints / name_step(4)
    assert start.progress["ledger"] == files.settled_at(4) == {"trained": 40, "dropped": {}}
    assert files.settled_at(0) == {"trained": 0, "dropped": {}}
    assert [batch.step for batch in start.batches] == [4]


def test_a_rollback_forgets_what_came_after(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    for step in (2, 4, 6):
        save(files, step)
    for step in range(6, 9):
        files.batches.write(make_batch(step))
    files.keep_group(9, Group(make_batch(9).trajectories, (), "9/0"))
    assert files.last_good(5) == 4 and files.last_good(1) == 0
    branch = next_branch(Branch(), version=9, step=4, undone=24)
    assert branch == Branch(attempt=1, shift=6, rate=0.5, undone=24)  # step 4 is now version 10
    files.roll_back(4, branch)
    start = files.find_start()
    assert start.step == 4 and start.batches == [] and start.branch == branch
    assert files.take_group("9/0") is None
    files.settle_branch(branch)
    files.batches.write(make_batch(4))
    assert [batch.step for batch in RunFiles(tmp_path).find_start().batches] == [4]


def test_an_interrupted_rollback_is_finished_by_the_next_start(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    files = RunFiles(tmp_path)
    save(files, 2)
    save(files, 6)
    monkeypatch.setattr(RunFiles, "forget_after", lambda *_: None)
    files.roll_back(2, Branch(1, 5, 0.5))  # killed before it removed anything
    monkeypatch.undo()
    start = RunFiles(tmp_path).find_start()
    assert start.step == 2 and start.branch == Branch(1, 5, 0.5)


def test_groups_are_found_again_until_their_step_is_learned(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    batch = make_batch(3)
    out = reject(make_batch(4, 1).trajectories[0], "reward raised OSError", "no such file")
    lost = Rejection("p", "3/7", "prompt lost")
    files.keep_group(3, Group(batch.trajectories, (lost, out), "3/7"))
    files.keep_group(31, Group((), (lost,), "31/0"))
    again = RunFiles(tmp_path)
    assert again.may_know("3/7") and not again.may_know("3/8")
    found = again.take_group("3/7")
    assert found is not None and found.rejected == (lost, out) and found.request == "3/7"
    assert found.rejected[0].trajectory is None and found.rejected[1].trajectory is not None
    assert describe_sample(found.rejected[1].trajectory) == describe_sample(out.trajectory)
    one = LearnerBatch(3, found.trajectories, (0, 0, 0), {})
    assert same(one, LearnerBatch(3, batch.trajectories, (0, 0, 0), {}))
    files.drop_groups(3)
    assert files.take_group("3/7") is None and files.take_group("31/0") is not None
    (tmp_path / ".groups" / "31-0.safetensors").write_bytes(b"half of a gr")
    assert files.take_group("31/0") is None
