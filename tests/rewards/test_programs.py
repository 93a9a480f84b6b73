"""Programs against their tests, in every form that a reference may have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raylign.config import SandboxConfig
from raylign.rewards.confinement import survey_walls
from raylign.rewards.exams import read_exam
from raylign.rewards.frames import pack, unpack
from raylign.rewards.programs import CodeVerifier, extract_program

confined = pytest.mark.skipif(not survey_walls().complete, reason="kernel cannot confine")

HUMAN_EVAL = """
METADATA = {"author": "x"}

def check(candidate):
    assert candidate([1, 2, 3]) == [2, 3, 4]
    assert all(abs(a - b) < 1e-6 for a, b in zip(candidate([0.5]), [1.5]))
    for size in range(5):
        assert len(candidate(list(range(size)))) == size
    assert rest(7) == 1
    try:
        candidate(None)
        assert False
    except TypeError:
        pass
"""
LIST_PROGRAM = "def up(xs):\n    return [x + 1 for x in xs]\n\ndef rest(n):\n    return n % 2\n"


@pytest.fixture(scope="module")
def verify() -> CodeVerifier:
    return CodeVerifier(SandboxConfig(seconds=4))


def test_the_program_is_the_last_block_that_is_python() -> None:
    assert extract_program("x = 1") == "x = 1"
    text = "First\n```python\na = 1\n```\nthen\n```py\nb = 2\n```\nOutput:\n```text\n3\n```\n"
    assert extract_program(text) == "b = 2\n"
    assert extract_program("```\nc = 3\n```") == "c = 3\n"
    assert extract_program("```python\nnever closed = 1") == "```python\nnever closed = 1"


@confined
@pytest.mark.parametrize(
    ("program", "reference", "passed"),
    [
        (
            "def f(a, b=0): return a + b",
            {"tests": ["assert f(1, b=2) == 3", "assert f(1) == 2"]},
            0.5,
        ),
        ("def f(x): return (x, [x])", {"tests": ["assert f(1) == (1, [1])"]}, 1),
        ("def f(x): return [x, [x]]", {"tests": ["assert f(1) == (1, [1])"]}, 0),
        ("def f(x): return x", {"tests": ["assert set(f([2, 1])) == {1, 2}"]}, 1),
        ("def f(x): return x", {"setup": "import math", "tests": ["assert f(math.pi) > 3"]}, 1),
        ("def f(x): raise KeyError(x)", {"tests": ["assert f(1) == 1", "assert True"]}, 0.5),
        (
            "def f(x): return x",
            {"entry": "f", "tests": [{"args": [[1, 2.0]], "output": [1, 2]}]},
            1,
        ),
        ("def f(x): return (x,)", {"entry": "f", "tests": [{"args": [1], "output": [1]}]}, 1),
        ("def f(x): return 0.1 + x", {"entry": "f", "tests": [{"args": [0.2], "output": 0.3}]}, 1),
        ("def f(x): return 0.31", {"entry": "f", "tests": [{"args": [0.2], "output": 0.3}]}, 0),
        ("def f(): return True", {"entry": "f", "tests": [{"output": 1}]}, 0),
        (
            "def f(**k): return k",
            {"entry": "f", "tests": [{"kwargs": {"a": None}, "output": {"a": None}}]},
            1,
        ),
        ("def f(): return 10**5000", {"entry": "f", "tests": [{"output": 1}]}, 0),
        ("def f(): return (i for i in [1])", {"entry": "f", "tests": [{"output": [1]}]}, 0),
        (
            "class Solution:\n    def f(self, x): return x",
            {"entry": "Solution.f", "tests": [{"args": [1], "output": 1}]},
            1,
        ),
        (LIST_PROGRAM, {"entry": "up", "tests": HUMAN_EVAL}, 1),
        (LIST_PROGRAM, HUMAN_EVAL + "\ncheck(up)\n", 1),
        (LIST_PROGRAM.replace("% 2", "% 3 * 2"), {"entry": "up", "tests": HUMAN_EVAL}, 0),
        ("def g(): return h()", {"prefix": "def h(): return 5", "tests": ["assert g() == 5"]}, 1),
        ("def f(:", {"tests": ["assert f() == 1"]}, 0),
        ("def f(): return f()", {"tests": ["assert f() == 1"]}, 0),
        ("x = 1\0", {"tests": ["assert f() == 1"]}, 0),
        ("", {"tests": ["assert f() == 1"]}, 0),
        ("print(sum(map(int, input().split())))", [{"input": "1 2\n", "output": "3"}], 1),
        (
            "n = int(input())\nfor i in range(n):\n    print(i, '  ')\nprint()",
            [{"input": "2\n", "output": "0\n1\n"}, {"input": "1\n", "output": "7\n"}],
            0.5,
        ),
        ("print(3)\nraise SystemExit(1)", [{"input": "", "output": "3"}], 0),
        ("import sys\nprint(3)\nsys.exit()", [{"input": "x" * 10**6, "output": "3"}], 1),
        ("if __name__ == '__main__':\n    print(3)", [{"input": "", "output": "3"}], 1),
        (
            "import sys, threading\nthreading.stack_size(1 << 26)\n"
            "t = threading.Thread(target=lambda: print(sys.stdin.read().upper()))\n"
            "t.start()\nt.join()",
            [{"input": "é", "output": "É"}],
            1,
        ),
    ],
)
def test_what_programs_earn(
    program: str, reference: Any, passed: float, verify: CodeVerifier
) -> None:
    text = reference if isinstance(reference, str) else json.dumps(reference)
    assert verify(f"```python\n{program}\n```", text) == {
        "correct": float(passed == 1),
        "passed": passed,
    }


@confined
def test_time_is_for_all_tests_together_and_what_passed_counts(verify: CodeVerifier) -> None:
    quick = CodeVerifier(SandboxConfig(seconds=0.8))
    program = "import time\ndef f(x):\n    time.sleep(x)\n    return x"
    tests = [{"args": [x], "output": x} for x in (0, 0.01, 60, 0)]
    parts = quick(program, json.dumps({"entry": "f", "tests": tests}))
    assert parts == {"correct": 0.0, "passed": 0.5}


@confined
def test_the_order_of_sets_is_the_same_in_every_run(verify: CodeVerifier) -> None:
    program = "print(list({str(i) for i in range(50)}))"
    once = CodeVerifier(SandboxConfig())._sandbox
    texts = set()
    for _ in range(2):
        with once.start(streams=True) as guest:
            texts.add(guest.run(program, "", 1e9).text)
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("", "no tests"),
        ("{", "not valid JSON"),
        ("def check(candidate): pass", "does not say what to check"),
        ("assert f(", "not Python"),
        ("[]", "no tests"),
        ('{"tests": []}', "no tests"),
        ('{"test": ["assert f()"]}', "has 'test'"),
        ('{"tests": ["assert 1", {"input": "", "output": ""}]}', "neither all texts nor all"),
        ('{"tests": [{"input": [1], "output": 1}]}', "give entry"),
        ('{"entry": "f", "tests": [{"input": "", "output": ""}]}', "has 'input'"),
        ('{"entry": "f", "tests": [{"args": [], "output": 1, "x": 1}]}', "has 'x'"),
        ('{"entry": 1, "tests": ["assert 1"]}', "entry is of type int"),
    ],
)
def test_a_reference_that_is_no_exam_is_an_error_and_no_zero(reference: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_exam(reference)


@confined
@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ({"setup": "import no_such_module", "tests": ["assert f(1) == 1"]}, "setup fails"),
        ({"tests": ["assert f(lambda: 1) == 1"]}, "is called with what is no plain value"),
    ],
)
def test_a_reference_that_cannot_be_run_is_an_error_too(
    reference: Any, says: str, verify: CodeVerifier
) -> None:
    with pytest.raises(ValueError, match=says):
        verify("def f(x): return x", json.dumps(reference))


def test_plain_values_survive_the_way() -> None:
    values = [None, True, 0, -1, 2**70, -(2**64), 1.5, float("inf"), 1 + 2j, "é\ud800", b"\0"]
    whole = [*values, (1, [2, {3}], frozenset({4})), {"a": [1], (1, 2): {}}]
    again = unpack(pack(whole))
    assert again == whole and [type(v) for v in again] == [type(v) for v in whole]
    assert unpack(pack(float("nan"))) != unpack(pack(float("nan")))


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_bytes_that_are_no_value_are_refused(cut: int) -> None:
    data = pack([1, {"k": "value", "l": (2.5, b"x")}])
    with pytest.raises(ValueError, match=r"no plain value|zip|invalid"):
        unpack(data[:cut])
    with pytest.raises(ValueError, match="no plain value"):
        unpack(b"l\xff\xff\xff\xff" * 100)
    with pytest.raises(ValueError, match="unhashable"):
        unpack(b"S\x05\x00\x00\x00l\x00\x00\x00\x00")


def test_what_is_no_plain_value_is_not_packed() -> None:
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    for value in (object(), lambda: 1, iter([]), deep, range(3)):
        with pytest.raises(TypeError):
            pack(value)
