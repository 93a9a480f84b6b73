from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raylign.config import UserError
from raylign.data.synthesis.answers import Answer, AnswerCache, request_key

ONE = Answer("one\nline \u2028 and ü", "stop", 3, 0)
TWO = Answer("two", "length", 9, 4)
PARTS: dict[str, Any] = {
    "model": "m",
    "sampling": {"temperature": 1.0, "seed": 5},
    "token_ids": (1, 2),
    "sample": 0,
}


def test_keys_depend_on_everything_an_answer_depends_on() -> None:
    key = request_key(**PARTS)
    others = [
        PARTS | {"model": "n"},
        PARTS | {"sampling": {"temperature": 1.0, "seed": 6}},
        PARTS | {"sampling": {"temperature": 0.5, "seed": 5}},
        PARTS | {"token_ids": (12,)},
        PARTS | {"sample": 1},
    ]
    assert len({key, *(request_key(**parts) for parts in others)}) == 6
    assert key == request_key(**PARTS | {"sampling": {"seed": 5, "temperature": 1.0}})
    assert len(key) == 32 and int(key, 16)


def keys(count: int) -> list[str]:
    return [request_key(**PARTS | {"sample": n}) for n in range(count)]


def test_answers_come_back_in_this_process_and_the_next(tmp_path: Path) -> None:
    a, b, c = keys(3)
    with AnswerCache(tmp_path / "new/cache") as cache:
        assert cache.get(a) is None
        cache.put(a, ONE)
        assert cache.get(a) == ONE
        # A second process at the same time has files of its own.
        with AnswerCache(tmp_path / "new/cache") as other:
            assert other.get(a) == ONE
            other.put(b, TWO)
            cache.put(c, TWO)
    with AnswerCache(tmp_path / "new/cache") as again:
        assert [again.get(key) for key in (a, b, c)] == [ONE, TWO, TWO]
        assert len(again) == 3
    assert len(list((tmp_path / "new/cache").iterdir())) == 2


def test_answers_are_there_before_the_cache_is_closed(tmp_path: Path) -> None:
    [a] = keys(1)
    AnswerCache(tmp_path).put(a, ONE)
    assert AnswerCache(tmp_path).get(a) == ONE


def test_a_line_cut_by_a_kill_loses_that_answer_alone(tmp_path: Path) -> None:
    a, b, c = keys(3)
    with AnswerCache(tmp_path) as cache:
        cache.put(a, ONE)
        cache.put(b, TWO)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    start = whole.index(b"\n") + 1
    for cut in range(start, len(whole)):
        file.write_bytes(whole[:cut])
        with AnswerCache(tmp_path) as cache:
            assert cache.get(a) == ONE and cache.get(b) is None
    with AnswerCache(tmp_path) as cache:
        cache.put(c, TWO)  # not behind the torn line
    with AnswerCache(tmp_path) as cache:
        assert (cache.get(a), cache.get(b), cache.get(c)) == (ONE, None, TWO)


def test_a_damaged_line_is_no_answer(tmp_path: Path) -> None:
    a, b = keys(2)
    with AnswerCache(tmp_path) as cache:
        cache.put(a, ONE)
        cache.put(b, TWO)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes().replace(b'"tokens": 3', b'"tokens" 3.'))
    with AnswerCache(tmp_path) as cache:
        assert cache.get(a) is None and cache.get(b) == TWO


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        AnswerCache(tmp_path / "file")
