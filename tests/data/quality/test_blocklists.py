from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from raylign.config import SignalsConfig, UserError
from raylign.data.quality.blocklists import count_bad_words, load_urls, load_words, match_urls
from raylign.data.quality.signals import measure

WORDS = "# our list\ndarn\nbad  phrase  # spelled with a blank\n\nüble\nc#\nhell\nhello\n坏话\n"
URLS = "bad.example\nhttps://Evil.example/  # a domain\npages.example/~joe/\nwww.w.example/a?b=1\n"


@pytest.fixture
def lists(tmp_path: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    words, urls = tmp_path / "words.txt", tmp_path / "urls.txt"
    words.write_text(WORDS, "utf-8")
    urls.write_text(URLS, "utf-8")
    return (words,), (urls,)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("darn", 1),
        ("Darn, DARN! (darn) dArN\ndarn", 5),
        ("darning, undarn, darn1, darn_ and darné are other words", 0),
        ("a bad phrase; a BAD Phrase. bad\nphrase, bad phrases", 2),
        ("Üble Sache, ÜBLE, üble; übler", 3),
        ("C# and c#, but cc# and c#x are others", 2),
        ("hell hello shell hell", 3),
        ("他说坏话了", 1),
        ("édarn darn\u3002", 1),
    ],
)
def test_words_are_counted_between_other_characters(
    text: str, count: int, lists: tuple[tuple[Path, ...], tuple[Path, ...]]
) -> None:
    found = count_bad_words([text, "x", text], load_words(lists[0]))
    assert found.tolist() == [count, 0, count]


@pytest.mark.parametrize(
    ("url", "domain", "any_of_it"),
    [
        (None, False, False),
        ("", False, False),
        ("https://bad.example/page", True, True),
        ("http://a.b.BAD.example:8080/x?y#z", True, True),
        ("user:pw@evil.example", True, True),
        ("https://notbad.example/", False, False),
        ("https://bad.example.org/", False, False),
        ("https://other.example/bad.example", False, False),
        ("https://pages.example/", False, False),
        ("https://www.pages.example/~joe", False, True),
        ("pages.example/~joe/deeper/page.html?q=1", False, True),
        ("pages.example/~joel", False, False),
        ("http://w.example/a?b=1", False, True),
        ("http://w.example/a?b=2", False, False),
    ],
)
def test_domains_and_addresses(
    url: str | None,
    domain: bool,
    any_of_it: bool,
    lists: tuple[tuple[Path, ...], tuple[Path, ...]],
) -> None:
    domains, either = match_urls([url], load_urls(lists[1]))
    assert (domains.tolist(), either.tolist()) == ([domain], [any_of_it])


def test_columns_of_signals(lists: tuple[tuple[Path, ...], tuple[Path, ...]]) -> None:
    table = pa.table(
        {
            "text": pa.array(["darn it all", "", "fine"], pa.large_string()),
            "url": pa.array(["https://x.evil.example", None, "https://fine.example"]),
        }
    )
    config = SignalsConfig(language=False, bad_words=lists[0], blocked_urls=lists[1])
    found = measure(table, config).select(
        ["bad_word_count", "bad_word_share", "blocked_domain", "url_blocked"]
    )
    assert found.column("bad_word_count").to_pylist() == [1, 0, 0]
    assert found.column("bad_word_share").to_pylist() == pytest.approx([1 / 3, 0, 0])
    assert found.column("url_blocked").to_pylist() == [True, False, False]
    assert found.column("blocked_domain").to_pylist() == [True, False, False]


def test_a_changed_list_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("one", "utf-8")
    assert count_bad_words(["one two"], load_words((file,))).tolist() == [1]
    file.write_text("one\ntwo", "utf-8")
    os.utime(file, ns=(1, 1))
    assert count_bad_words(["one two"], load_words((file,))).tolist() == [2]


def test_mistakes_are_one_line_with_key_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^prepare.signals.bad_words=.*gone: no such file; corr"):
        load_words((tmp_path / "gone",))
    empty, binary, odd = tmp_path / "empty", tmp_path / "binary", tmp_path / "odd"
    empty.write_text("# nothing\n\n", "utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    odd.write_text("fine.example\n0.0.0.0 hosts.example\n", "utf-8")
    with pytest.raises(UserError, match=r"prepare.signals.blocked_urls: .*empty has no entry"):
        load_urls((empty,))
    with pytest.raises(UserError, match=r"binary cannot be read as UTF-8 text"):
        load_words((binary,))
    with pytest.raises(UserError, match=r"odd:2: '0.0.0.0 hosts.example' is neither"):
        load_urls((odd,))
