from __future__ import annotations

from pathlib import Path

import pytest

from raylign.config import UserError
from raylign.rewards.source import load_reward
from raylign.rewards.verifiers import VERIFIERS

MODULE = """
LIMIT = 3
def score(completion, reference):
    return float(completion == reference)
def narrow(completion):
    return 1.0
class Rubric:
    def __call__(self, completion, reference):
        return 0.5
    @staticmethod
    def judge(completion, reference, strict=False):
        return {"judged": 1.0}
rubric = Rubric()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "house_rewards.py").write_text(MODULE)
    (tmp_path / "needy_rewards.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "house_rewards"


@pytest.mark.parametrize("name", VERIFIERS)
def test_verifiers_by_name(name: str) -> None:
    assert load_reward(name) is VERIFIERS[name]


def test_functions_and_other_callables_by_module(module: str) -> None:
    assert load_reward(f"{module}:score")("a", "a") == 1.0
    assert load_reward(f"{module}:rubric")("a", "b") == 0.5
    assert load_reward(f"{module}:Rubric.judge")("a", "b") == {"judged": 1.0}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("arithmetics", "unknown verifier; did you mean 'arithmetic'\\? choose from arithmetic, "),
        ("zzz", "unknown verifier; choose from .*, or give module:function"),
        ("house_rewards.score", "or give module:function"),
        ("house_rewards:", "expected module:function"),
        (":score", "expected module:function"),
        (".relative:score", "expected module:function"),
        ("house_reward:score", "no module named 'house_reward'; run from its directory"),
        ("no.such.package:score", "no module named 'no'; run from its directory"),
        ("needy_rewards:score", "no module named 'no_such_dependency'; needy_rewards itself"),
        ("house_rewards:scores", "house_rewards has no 'scores'; did you mean 'score'\\?"),
        ("house_rewards:LIMIT", "is of type int; name a function"),
        ("house_rewards:narrow", r"takes \(completion\); it must take \(completion, reference\)"),
    ],
)
def test_mistakes_get_one_line_with_a_remedy(module: str, source: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        load_reward(source)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"align.reward.source={source!r}: ")
