"""Whatever a reward function does to its worker, groups are scored, or set aside with a reason."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.reward import RewardPool, spawn_reward_worker
from actors.scoring import CompositeScorer
from actors.supervision import BudgetSpent
from raylign.config import RewardConfig, UserError
from raylign.records import Prompt, Trajectory
from raylign.rewards.confinement import survey_walls
from raylign.rewards.outcomes import Rejection
from raylign.runtime import worker_env

PROMPT = Prompt("p0", (1,), "What?", "7")
REWARDS = """
import ctypes, os, sys, time

def hostile(completion, reference, *, trajectory):
    what, _, path = completion.partition(" ")
    if what == "once" and not os.path.exists(path):
        open(path, "w").close()
        os._exit(1)
    if what == "exit":
        os._exit(0)
    if what == "segfault":
        ctypes.string_at(0)
    if what == "hang":
        time.sleep(600)
    if what == "slow":
        time.sleep(0.4)
    if what == "raise":
        raise KeyError("no")
    if what == "leak":
        hostile.kept = bytearray(1200 << 20)
    if what == "loaded":
        return float(path in sys.modules)
    odd = {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "1", "huge": 1e38}
    return odd.get(what, float(len(completion)))
"""


def make(text: str) -> Trajectory:
    return Trajectory(
        prompt_id="p0",
        group_id="g0",
        token_ids=np.array([1, 2], np.int32),
        loss_mask=np.array([False, True]),
        logprobs=np.zeros(2, np.float32),
        versions=np.array([-1, 0], np.int32),
        finish_reason="stop",
        text=text,
    )


Start = Callable[..., tuple[RewardPool, CompositeScorer]]


@pytest.fixture
def start(ray_cluster: None, tmp_path: Path) -> Iterator[Start]:
    (tmp_path / "hostile_rewards.py").write_text(REWARDS)
    pools = []

    def begin(judge: Any = None, **fields: Any) -> tuple[RewardPool, CompositeScorer]:
        source = {} if "parts" in fields else {"source": "hostile_rewards:hostile"}
        config = RewardConfig.model_validate(source | fields)
        env = worker_env()
        env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(env.get("PYTHONPATH", ""))])
        options: dict[str, Any] = {"num_cpus": 0, "runtime_env": {"env_vars": env}}
        pool = RewardPool(config, lambda name: spawn_reward_worker(name, options, config))
        pools.append(pool)
        return pool, CompositeScorer(config, 100, pool, judge)

    yield begin
    for pool in pools:
        pool.stop()


def score(scorer: CompositeScorer, *texts: str) -> tuple[dict[str, float | None], list[str]]:
    """Rewards by text, and the reasons where there is none."""
    scores = asyncio.run(scorer.score(tuple(make(text) for text in texts), PROMPT))
    kept = {t.text: t.reward for t in scores.scored.kept}
    return kept, [r.reason for r in scores.scored.rejected]


def test_a_worker_with_a_plain_function_has_no_torch(start: Start) -> None:
    """It would take longer to start than all else that a worker loads, and hold more memory."""
    _, scorer = start(attempts=1)
    found, _ = score(scorer, "loaded torch", "loaded raylign.rewards.panel")
    assert found == {"loaded torch": 0.0, "loaded raylign.rewards.panel": 1.0}


@pytest.mark.slow
def test_whatever_a_completion_does_its_siblings_are_scored_as_if_it_had_never_been(
    start: Start, tmp_path: Path
) -> None:
    pool, scorer = start(timeout_s=6, attempts=2)
    clean, none = score(scorer, "a", "bb", "ccc")
    assert clean == {"a": 1.0, "bb": 2.0, "ccc": 3.0} and not none
    started = time.monotonic()
    kept, reasons = score(scorer, "a", "segfault", "bb", "nan", "hang", "raise", "ccc")
    assert kept == clean
    assert reasons == [
        "quarantined: worker died",
        "reward is nan",
        "quarantined: worker timed out",
        "reward raised KeyError",
    ]
    assert time.monotonic() - started < 60
    once = f"once {tmp_path / 'flag'}"
    assert score(scorer, once) == ({once: float(len(once))}, [])  # given to another worker
    assert score(scorer, "leak") == ({"leak": 4.0}, [])
    assert sorted(reason.partition(": ")[2] for reason in pool.failures) == [
        "it grew by 1.2 GiB",
        *["worker died"] * 3,
        "worker timed out",
    ]
    assert score(scorer, "a") == ({"a": 1.0}, [])


@pytest.mark.slow
def test_the_budget_ends_and_names_the_first_failure(start: Start) -> None:
    _, scorer = start(attempts=3, max_restarts=0)
    with pytest.raises(BudgetSpent, match="the first was reward-0: worker died"):
        score(scorer, "exit")


def test_mistakes_of_the_recipe_are_raised_as_they_are(start: Start) -> None:
    _, scorer = start(source="hostile_rewards:hostil")
    with pytest.raises(UserError, match="did you mean 'hostile'") as error:
        score(scorer, "a")
    assert "\n" not in str(error.value)
    config = RewardConfig(source="judge", weights={"corect": 1.0})
    with pytest.raises(UserError, match="weights names corect"):
        score(CompositeScorer(config, 100, None, Judge([1.0])), "a")


def test_workers_come_and_go_while_groups_wait(start: Start) -> None:
    pool, scorer = start(count=1)

    async def go() -> tuple[float, set[str]]:
        await scorer.score((make("a"),), PROMPT)
        groups = [asyncio.create_task(scorer.score((make("slow"),), PROMPT)) for _ in range(12)]
        assert await scorer.scalable["rewards"](3) == "3 workers, 1 before"
        first, *_ = groups
        await first
        assert await scorer.scalable["rewards"](1) == "1 workers, 3 before"
        scores = await asyncio.gather(*groups)
        return sum(len(s.scored.kept) for s in scores), {s.worker for s in scores}

    kept, _ = asyncio.run(go())
    assert kept == 12 and pool.count == 1 and len(pool._workers) == 1 and not pool.failures
    with pytest.raises(UserError, match="at least 1 worker must stay"):
        asyncio.run(pool.scale(0))


class Judge:
    """Says what it was told to."""

    def __init__(self, says: list[Any], seconds: float = 0.0) -> None:
        self.says, self.seconds, self.stopped = says, seconds, False

    async def measure(
        self, trajectories: tuple[Trajectory, ...], prompt: Prompt
    ) -> list[float | Rejection]:
        await asyncio.sleep(self.seconds)
        return self.says

    async def scale(self, count: int) -> str:
        return "none"

    def stop(self) -> None:
        self.stopped = True


def test_a_worker_is_not_busy_while_the_judge_thinks(start: Start) -> None:
    parts = {"long": {"source": "hostile_rewards:hostile"}, "liked": {"source": "judge"}}
    _, scorer = start(Judge([0.5], seconds=1.5), parts=parts)
    scores = asyncio.run(scorer.score((make("slow"),), PROMPT))  # 0.4 s in the function
    assert scores.worker == "reward-0" and 0.4 <= scores.end - scores.start < 1.4
    [(who, begun, ended)] = scores.others
    assert who == "judge" and ended - begun >= 1.4


@pytest.mark.skipif(not survey_walls().complete, reason="kernel cannot confine")
def test_programs_functions_and_judges_are_one_sum(start: Start) -> None:
    parts = {
        "long": {"source": "hostile_rewards:hostile", "weight": 0.5},
        "liked": {"source": "judge", "weight": 10.0},
        "runs": {"source": "code", "weight": 100.0},
    }
    judge = Judge([0.25, 0.5, Rejection("p0", "g0", "judge abstained"), float("nan")])
    _, scorer = start(judge, parts=parts)
    texts = ("def f(): return 7", "import os; os._exit(0)", "f = 7", "")
    prompt = Prompt("p0", (1,), "What?", '{"tests": ["assert f() == 7"]}')
    scores = asyncio.run(scorer.score(tuple(make(text) for text in texts), prompt)).scored
    assert [(t.reward, t.reward_parts) for t in scores.kept] == [
        (8.5 + 2.5 + 100, {"long": 17, "liked": 0.25, "runs": 1, "runs/passed": 1}),
        (11.0 + 5.0 + 0, {"long": 22, "liked": 0.5, "runs": 0, "runs/passed": 0}),
    ]
    assert [r.reason for r in scores.rejected] == ["judge abstained", "judge is nan"]
    assert sorted(scorer.scalable) == ["judges", "rewards"]
    scorer.stop()
    assert judge.stopped


def test_a_judge_alone_needs_no_workers() -> None:
    config = RewardConfig(source="judge")
    scorer = CompositeScorer(config, 100, None, Judge([0.25, 0.75]))
    kept, rejected = score(scorer, "a", "b")
    assert kept == {"a": 0.25, "b": 0.75} and not rejected
    kept, reasons = score(scorer, "a")
    assert kept == {} and reasons == ["judge gave a wrong number of values"]
    with pytest.raises(ValueError, match="a judge is for judged sources"):
        CompositeScorer(config, 100, None, None)


def test_what_a_checkpoint_holds() -> None:
    config = RewardConfig.model_validate({"source": "judge", "shaping": {"scale": "running"}})
    scorer, other = (CompositeScorer(config, 100, None, Judge([0.0, 4.0])) for _ in range(2))
    trajectories = asyncio.run(scorer.score((make("a"), make("b")), PROMPT)).scored.kept
    assert [t.reward for t in trajectories] == [0.0, 4.0]
    assert [t.reward for t in scorer.settle(trajectories)] == pytest.approx([0.0, 2**0.5])
    other.restore(scorer.state())
    assert [t.reward for t in other.settle(trajectories)] == [
        t.reward for t in scorer.settle(trajectories)
    ]
