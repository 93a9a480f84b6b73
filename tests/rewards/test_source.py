from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raylign.config import RewardConfig, UserError
from raylign.records import Prompt, Trajectory
from raylign.rewards.confinement import survey_walls
from raylign.rewards.panel import Panel, check_sources
from raylign.rewards.source import VERIFIERS, load_reward

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
def asking(completion, reference, *, prompt):
    return float(prompt == "p")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "house_rewards.py").write_text(MODULE)
    (tmp_path / "needy_rewards.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "house_rewards"


SAMPLES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "arithmetic": ("<work></work><answer>7</answer>", "7", {}),
    "number": ("#### 7", "7", {}),
    "numeric": ("#### 7.1", "7", {"absolute": 0.5}),
    "math": (r"\boxed{\frac{14}{2}}", "7", {}),
    "exact": ("SEVEN", "seven", {"ignore_case": True}),
    "choice": ("The answer is (B).", "B", {}),
    "regex": ("x=7;", "7", {"pattern": r"x=(\d+)"}),
    "format": ("<a>x</a><b>7</b>", "7", {"tags": "a,b"}),
    "code": ("def f(): return 7", '{"tests": ["assert f() == 7"]}', {"packages": False}),
}


@pytest.mark.parametrize("name", sorted(set(VERIFIERS) - {"environment"}))
def test_verifiers_by_name(name: str) -> None:
    completion, reference, options = SAMPLES[name]
    if name == "math" and importlib.util.find_spec("math_verify") is None:
        with pytest.raises(UserError, match="math-verify is not installed; pip install"):
            load_reward(name)
        return
    if name == "code" and not survey_walls().complete:
        pytest.skip("kernel cannot confine")
    parts = load_reward(name, options)(completion, reference)
    assert isinstance(parts, dict) and set(parts.values()) == {1.0}


def make_trajectory(text: str) -> Trajectory:
    nothing = np.zeros(2, np.int32)
    return Trajectory("p", "g", nothing, nothing > 0, nothing, nothing, "stop", text)


def test_what_an_environment_gave() -> None:
    trajectory = make_trajectory("text")
    function = load_reward("environment")
    with pytest.raises(ValueError, match="gave no reward"):
        function("", "", trajectory=trajectory)
    assert function("", "", trajectory=replace(trajectory, environment_reward=0.5)) == {
        "score": 0.5
    }


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        (
            "numeric",
            {"relativ": 1},
            "options.relativ: numeric has no such option; did you mean 'relative'",
        ),
        ("number", {"x": 1}, "number has no such option; it has none"),
        ("numeric", {"relative": "much"}, "relative='much': give a value of type float"),
        ("numeric", {"relative": True}, "relative=True: give a value of type float"),
        ("numeric", {"relative": -1}, "must be 0 or more"),
        ("regex", {}, "needs the option pattern; give align.reward.options.pattern"),
        ("regex", {"pattern": "("}, "is no regular expression"),
        ("regex", {"pattern": "(a)(b)"}, "several groups"),
        ("format", {"tags": "a,,b"}, "give different names"),
        ("choice", {"letters": "abc"}, "give upper-case letters"),
        ("house_rewards:score", {"strict": 1}, "with options strict"),
    ],
)
def test_options_are_checked(module: str, source: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as error:
        load_reward(source, options)
    assert "\n" not in str(error.value)


def test_options_of_functions(module: str) -> None:
    assert load_reward(f"{module}:Rubric.judge", {"strict": True})("a", "b") == {"judged": 1.0}
    assert load_reward(f"{module}:asking")("a", "b", prompt="p") == 1.0


def test_a_single_source_takes_options_as_a_part_does() -> None:
    options = {"pattern": r"x=(\d+)"}
    prompt = Prompt("p", (1,), "What is x?", "7")
    trajectories = [make_trajectory(text) for text in ("so x=7;", "so x=8;", "7")]
    single = RewardConfig(source="regex", options=options)
    part = RewardConfig.model_validate({"parts": {"a": {"source": "regex", "options": options}}})
    check_sources(single)
    [measured] = Panel(single).measure(trajectories, prompt).values()
    assert [next(iter(each.values())) for each in measured] == [1.0, 0.0, 0.0]  # type: ignore[union-attr]
    assert Panel(part).measure(trajectories, prompt) == {"a": measured}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"source": "regex"}, "align.reward.options.pattern"),
        ({"source": "regex", "options": {"patern": "x"}}, "did you mean 'pattern'"),
        ({"source": "regex", "options": {"pattern": 3}}, "align.reward.options.pattern=3: give a"),
        ({"source": "judge", "options": {"a": 1}}, "align.reward.options has no effect with"),
    ],
)
def test_options_of_a_single_source_are_checked(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        check_sources(RewardConfig.model_validate(given))


def test_options_beside_parts_are_refused() -> None:
    given = {"parts": {"a": {"source": "exact"}}, "options": {"ignore_case": True}}
    with pytest.raises(ValueError, match="options has no effect beside parts"):
        RewardConfig.model_validate(given)


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
