"""What is told of a group of ranks that failed; the runs themselves are in tests/jobs."""

from __future__ import annotations

from ray.exceptions import ActorDiedError

from raylign.config import UserError
from raylign.training.supervised import explain_failure

ECHO = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1")


def test_the_first_failure_of_a_group_is_told_not_its_echo() -> None:
    defect = explain_failure("sft", 2, {0: ECHO, 1: ZeroDivisionError("at\nheart"), 2: ECHO})
    assert isinstance(defect, RuntimeError)
    assert str(defect) == "sft: rank 1 failed: ZeroDivisionError: heart"


def test_a_dead_process_is_for_the_user_to_put_right() -> None:
    death = explain_failure("sft", 2, {0: ECHO, 1: ActorDiedError()})
    assert isinstance(death, UserError)
    assert str(death).startswith("sft: rank 1 died, after 2 restarts of the group (")
    assert "lower sft.micro_batch_size" in str(death) and "\n" not in str(death)


def test_an_echo_alone_is_told_as_it_is() -> None:
    assert "Connection closed by peer" in str(explain_failure("sft", 0, {0: ECHO, 1: ECHO}))
