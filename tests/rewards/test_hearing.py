"""What of a judge's configuration is refused before anything starts."""

from __future__ import annotations

import re
from typing import Any

import pytest

from raylign.config import JudgeConfig, UserError
from raylign.rewards.hearing import check_judge

PLACE = {"endpoint": "http://localhost/v1", "endpoint_model": "m"}


@pytest.mark.parametrize(
    ("keys", "group_size", "says"),
    [
        ({"samples": 3}, 8, "judge.samples=3: with temperature=0 every verdict is the same"),
        ({"pairs": 2}, 8, "judge.pairs has no effect without judge.compare=true"),
        ({"both_orders": True}, 8, "judge.both_orders has no effect"),
        ({"compare": True, "scale": (1, 5)}, 8, "judge.scale has no effect with judge.compare"),
        ({"compare": True}, 1, "group_size=1 leaves nothing to compare with"),
        (
            {"compare": True, "pairs": 3},
            7,
            "pairs=3 leaves some of 7 completions without a pair; give at least 4",
        ),
        ({"most": 3}, 8, "judge.most has no effect without judge.model"),
        ({"scale_queue": 3}, 8, "judge.scale_queue has no effect without judge.model"),
    ],
)
def test_keys_without_effect_are_refused(keys: dict[str, Any], group_size: int, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        check_judge(JudgeConfig(**PLACE, **keys), group_size)


def test_what_makes_sense_passes() -> None:
    for keys in ({}, {"samples": 2, "temperature": 0.7}, {"compare": True, "pairs": 4}):
        check_judge(JudgeConfig(**PLACE, **keys), 8)
    check_judge(JudgeConfig(**PLACE, compare=True, pairs=1))
    with pytest.raises(UserError, match=r"most=4 is fewer than judge.rollout.count=5"):
        check_judge(JudgeConfig(model="m", rollout={"count": 5}))
