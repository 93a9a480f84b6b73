from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numba.core.caching
import pyarrow as pa
import pytest

from raylign.data import words as definitions
from raylign.data.words import Words, kernel, split_words


def spell(text: str) -> list[str]:
    """What the kernel takes for words, cut out of the text by the positions it reports."""
    words = split_words([text])
    body = text.encode()
    return [body[a:b].decode() for a, b in zip(words.starts, words.ends, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is 3 + 5?", ["What", "is", "3", "+", "5"]),
        ("ones: 3+5=8, carry", ["ones", "3+5=8", "carry"]),
        ("pi is 3.14, about 22/7.", ["pi", "is", "3.14", "about", "22/7"]),
        ("1,234 and 5, 6", ["1,234", "and", "5", "6"]),
        ("3 +5 -x a-b", ["3", "5", "x", "a", "b"]),
        ("= - x\n+", ["=", "-", "x", "+"]),
        ("3 =? 4 =. 5 == 6 -- 7", ["3", "=", "4", "=", "5", "6", "7"]),
        ("<answer>93</answer>", ["answer", "93", "answer"]),
        ("\u201cnaïve\u201d\u2014don\u2019t\u2026", ["naïve", "don", "t"]),
        ("Größe 東京", ["Größe", "東京"]),
        ("", []),
        (" .,;!", []),
        ("a", ["a"]),
        ("+", ["+"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert spell(text) == expected


def hashes(text: str) -> list[int]:
    return split_words([text]).hashes.tolist()


def test_hash_ignores_ascii_case_and_nothing_else() -> None:
    assert hashes("The CAT") == hashes("the cat")
    assert len(set(hashes("cat cats 7 8 17 78 + - Ä ä a"))) == 11


def test_documents_do_not_touch() -> None:
    """Neighbours share one buffer; a word ends where its document ends."""
    words = split_words(["ab", "cd", "", "3", "+", "5"])
    assert [len(words.of(d)) for d in range(6)] == [1, 1, 0, 1, 1, 1]
    assert words.of(0).tolist() == hashes("ab")
    assert words.starts.tolist() == [0] * 5


def same(a: Words, b: Words) -> bool:
    names = ("hashes", "offsets", "starts", "ends")
    return all((getattr(a, n) == getattr(b, n)).all() for n in names)


def test_every_arrow_layout_gives_the_same_words() -> None:
    texts = ["one two", None, "", "drei vier fünf", "6 + 7"]
    plain = split_words([text or "" for text in texts])
    short, large = pa.array(texts, pa.string()), pa.array(texts, pa.large_string())
    chunked = pa.chunked_array([short[:2], short[2:]])
    sliced = pa.array(["x y z", *texts, "tail"], pa.string())[1:-1]
    for layout in (short, large, chunked, sliced):
        assert same(split_words(layout), plain)
    assert len(split_words(pa.chunked_array([], pa.string())).hashes) == 0
    assert split_words([]).offsets.tolist() == [0]


def test_kernels_work_without_a_place_to_cache_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    assert kernel(lambda x: x + 1)(2) == 3


def test_prose_agrees_with_a_regular_expression() -> None:
    text = " ".join(f"Word{i} isn't here; (see {i * 37}) end." for i in range(300))
    assert spell(text) == re.findall(r"[A-Za-z0-9]+", text)


def test_machine_code_follows_kernels_in_other_files(tmp_path: Path) -> None:
    """numba's own cache looks at the file of the calling kernel alone."""
    package = tmp_path / "package"
    package.mkdir()
    source = Path(definitions.__file__).read_text()
    (package / "words.py").write_text(source)
    (package / "caller.py").write_text(
        "from words import kernel\nfrom callee import inner\n\n\n"
        "@kernel\ndef outer(x):\n    return inner(x) + 1\n"
    )
    for value in (10, 20):
        (package / "callee.py").write_text(
            f"from words import kernel\n\n\n@kernel\ndef inner(x):\n    return x + {value}\n"
        )
        command = [sys.executable, "-c", "from caller import outer; print(outer(0))"]
        done = subprocess.run(command, cwd=package, capture_output=True, text=True, check=True)
        assert int(done.stdout) == value + 1
