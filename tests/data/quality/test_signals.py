"""Every metric against a slow twin that is written from the definitions, on varied texts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raylign.config import SignalsConfig, UserError
from raylign.config.synthesis import FitConfig
from raylign.data.quality import signals
from raylign.data.quality.characters import CLOSERS, NOT_MATHS, TERMINALS
from raylign.data.quality.classifier import Classifier
from raylign.data.quality.lines import BULLETS, COMMENTS, PHRASES
from raylign.data.quality.signals import COUNTS, EXTRAS, METRICS, measure

STOP = ("the", "be", "to", "of", "and", "that", "have", "with")


def build_table(texts: list[str]) -> pa.Table:
    urls = pa.nulls(len(texts), pa.string())
    return pa.table({"text": pa.array(texts, pa.large_string()), "url": urls})


def measure_one(text: str) -> dict[str, Any]:
    return {
        name: values[0]
        for name, values in measure(build_table([text]), SignalsConfig(language=False))
        .to_pydict()
        .items()
    }


def divide(count: float, among: float) -> float:
    return count / among if among else 0.0


def split_lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def split_paragraphs(text: str) -> list[str]:
    groups: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            groups[-1].append(line.strip())
        elif groups[-1]:
            groups.append([])
    return ["\n".join(group) for group in groups if group]


def find_repeats(items: list[str]) -> list[str]:
    seen: set[str] = set()
    repeats = []
    for item in items:
        if item in seen:
            repeats.append(item)
        seen.add(item)
    return repeats


def count_top(words: list[str], n: int) -> int:
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    if not grams:
        return 0
    gram, count = grams.most_common(1)[0]
    return len(" ".join(gram)) * count if count > 1 else 0


def count_duplicates(words: list[str], n: int) -> int:
    seen, found, i = set(), 0, 0
    while i + n <= len(words):
        gram = tuple(words[i : i + n])
        if gram in seen:
            found += sum(map(len, gram))
            i += n
        else:
            seen.add(gram)
            i += 1
    return found


def count_sentences(line: str) -> int:
    count = 1
    words = line.split()
    for place, word in enumerate(words):
        ended = full = ""
        for i, char in enumerate(word):
            if char in TERMINALS:
                initial = char == "." and i == 1 and word[0].isalnum()
                ended, full = "" if initial else char, char
            elif char not in CLOSERS:
                count += ended >= "\u3000"
                ended = ""
        if ended and place + 1 < len(words):
            count += full != "." or not words[place + 1][0].islower()
    return count


def ends_sentence(line: str) -> bool:
    quotes = set(CLOSERS) - set(")]}\uff09\u3011")
    return (line[-1] in TERMINALS or line[-1] in quotes) and not line.endswith("...")


def is_kept(line: str) -> bool:
    words, low = line.split(), line.lower()
    return (
        ends_sentence(line)
        and len(words) >= 3
        and max(map(len, words)) <= 1000
        and not any(phrase in low for key in ("javascript", "policy") for phrase in PHRASES[key])
    )


def find_encoded(text: str) -> list[int]:
    runs = [m.group() for m in re.finditer(r"[A-Za-z0-9+/]{64,}", text)]
    lengths = [len(r) for r in runs if 4 * sum(map(str.isalnum, r)) >= 3 * len(r)]
    byte = r"[0\\]x[0-9a-fA-F]{2}"
    for listed in re.finditer(rf"(?:{byte}[, \t\r\n]*){{7,}}{byte}", text):
        lengths.append(len(listed.group()))
    return lengths


def describe(text: str) -> dict[str, float]:
    words, lines = text.split(), split_lines(text)
    ink = "".join(words)
    low = [line.lower() for line in lines]
    repeats, paragraphs = find_repeats(lines), split_paragraphs(text)
    repeated = sum(map(len, repeats))
    raw = text.split("\n")
    raw = raw if raw[-1] else raw[:-1]
    kept = [line for line in lines if is_kept(line)]
    encoded = find_encoded(text)
    maths = sum(unicodedata.category(c) == "Sm" and c not in NOT_MATHS for c in text)
    runs = re.findall(r"[^\W\d_]+", text)

    def share(test: Any) -> float:
        return divide(sum(map(test, lines)), len(lines))

    def share_with(key: str) -> float:
        return divide(sum(any(p in line for p in PHRASES[key]) for line in low), len(lines))

    again = find_repeats(paragraphs)
    return {
        "chars": len(text),
        "alpha_share": divide(sum(map(str.isalnum, ink)), len(ink)),
        "words": len(words),
        "mean_word_chars": divide(len(ink), len(words)),
        "hash_word_ratio": divide(text.count("#"), len(words)),
        "ellipsis_word_ratio": divide(text.count("...") + text.count("\u2026"), len(words)),
        "alpha_word_share": divide(sum(any(map(str.isalpha, w)) for w in words), len(words)),
        "stop_words": len(set(STOP) & {"".join(run).lower() for run in runs}),
        "bullet_line_share": share(lambda s: s[0] in BULLETS),
        "ellipsis_line_share": share(lambda s: s.endswith(("...", "\u2026"))),
        "line_repeat_share": divide(len(repeats), len(lines)),
        "duplicate_line_char_share": divide(repeated, len(text)),
        "duplicate_paragraph_share": divide(len(again), len(paragraphs)),
        "duplicate_paragraph_char_share": divide(sum(map(len, again)), len(text)),
        **{f"top_{n}gram_char_share": divide(count_top(words, n), len(text)) for n in (2, 3, 4)},
        **{
            f"duplicate_{n}gram_char_share": divide(count_duplicates(words, n), len(text))
            for n in range(5, 11)
        },
        "sentences": sum(map(count_sentences, lines)),
        "terminal_line_share": share(ends_sentence),
        "javascript_line_share": share_with("javascript"),
        "policy_line_share": share_with("policy"),
        "c4_line_share": divide(len(kept), len(lines)),
        "c4_sentences": sum(map(count_sentences, kept)),
        "lorem_ipsum": sum("lorem ipsum" in line for line in low),
        "curly_brackets": text.count("{"),
        "punctuated_line_share": share(lambda s: s[-1] in TERMINALS),
        "short_line_share": share(lambda s: len(s) <= 30),
        "duplicate_char_share": divide(repeated, len(text.replace("\n", ""))),
        "newline_word_ratio": divide(text.count("\n"), max(len(words), 1)),
        "mean_line_chars": divide(sum(map(len, raw)), len(raw)),
        "max_line_chars": max(map(len, raw), default=0),
        "alphanumeric_share": divide(sum(map(str.isalnum, ink)), len(text)),
        "autogenerated": sum(any(p in line for p in PHRASES["generated"]) for line in low[:5]),
        "comment_line_share": share(lambda s: s.startswith(COMMENTS)),
        "encoded_share": divide(sum(encoded), len(text)),
        "encoded_chars": max(encoded, default=0),
        "maths_word_ratio": divide(
            maths + len(re.findall(r"\\[A-Za-z]", text)), max(len(words), 1)
        ),
        "digit_share": divide(sum(unicodedata.category(c) == "Nd" for c in ink), len(ink)),
    }


TEXTS = [
    "",
    "word",
    " \t\r\n \u3000\u2028 ",
    'Plain words that people write end! do they? some?! a. "Yes." J. R. Smith e.g. x.',
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Äpfel, Öl… und „Übel“.\n\nÄ.",
    "敏捷的棕色狐狸跳过了懒狗。你好吗？是的！“对。”他说。\n第二行没有标点",
    "الثعلب البني السريع يقفز. هل أنت بخير؟ نعم، ١٢٣ بخير۔ حسنا",
    "emoji 😀😀 👩‍👩‍👧 and 𝛼 + 𝛽 = \U00011f43 \U000e0041 ends 🎉",
    "one\r\ntwo\r\n\r\none\r\ntwo\r\n",
    "- a\n* b\n• c\n– d\n...\n…\nwait...\nmore....\n# head\n// x\n/* y */\n; z\n% t\n--- \n-",
    "JavaScript is off\nWe use cookies here.\nRead the Terms of Use now.\nLorem ipsum dolor {} {",
    "# Auto-Generated by a tool; DO NOT EDIT\n" * 7,
    "A paragraph\nof lines.\n\nAnother.\n \t\nA paragraph\nof lines.\n\n\n\nAnother.",
    "a b c d e f g h i j k l " * 9 + "to be or not to be, that is the question " * 3,
    "\\frac{a}{b} = \\sum_i x_i \\le \\\\ $\\alpha$ ∑∫≤ 3 < 4 | 5 ~ 6 \\",
    "data = '" + "QUJD" * 40 + "' " + "/" * 90 + " " + "a" * 63 + " " + "b" * 64,
    "x = [" + ", ".join(f"0x{i:02X}" for i in range(20)) + r"] \x41\x42\x43 0x00 0xZZ 0x1",
    "tail without feed\n\n  indented   line with   gaps \n indented   line with   gaps\n\n",
    "the\u00a0nbsp\u2003em\u0085nel\x1cfs That WITH haves and/or be-to OF. stop。next end.」Next",
    "word " * 3 + "x" * 1200 + " ends here.",
    "\u202aفقط\u202c a.b.c 3.14 v1.2.3. Next one? yes! no. 12. May",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_every_metric_equals_its_twin(text: str) -> None:
    check(text, measure_one(text))


def test_long_line_and_random_texts() -> None:
    rng = np.random.default_rng(0)
    pieces = [*"a\nÄ字。9😀{", '"', "the ", "\n\n", ". ", "...", "# ", " \t"]
    texts = ["".join(rng.choice(pieces, rng.integers(0, 300))) for _ in range(150)]
    texts.append("".join(rng.choice(["lorem ipsum ", "ab", "0", "字 ", "use cookies "], 200_000)))
    assert len(texts[-1]) > 1_000_000 and "\n" not in texts[-1]
    found = measure(build_table(texts), SignalsConfig(language=False)).to_pylist()
    for text, row in zip(texts, found, strict=True):
        check(text, row)


def check(text: str, found: dict[str, Any]) -> None:
    expected = describe(text)
    assert set(expected) == set(METRICS)
    for name in METRICS:
        if name in COUNTS:
            assert found[name] == expected[name], name
        else:
            assert found[name] == np.float32(expected[name]), name


def test_rows_do_not_depend_on_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SignalsConfig(language=False)
    whole = measure(build_table(TEXTS), config)
    sliced = build_table(["before", *TEXTS, "after"]).slice(1, len(TEXTS))
    assert measure(sliced, config).equals(whole)
    monkeypatch.setattr(signals, "CHUNK", 100)
    assert measure(build_table(TEXTS), config).equals(whole)
    parts = pa.concat_tables([build_table(TEXTS[:7]), build_table(TEXTS[7:])])
    assert measure(parts, config).equals(whole)


def test_no_rows_and_a_null() -> None:
    empty = measure(build_table([]), SignalsConfig(language=False))
    assert len(empty) == 0 and set(empty.column_names) == set(METRICS)
    table = pa.table({"text": pa.array([None, "ab"], pa.large_string()), "url": [None, None]})
    assert measure(table, SignalsConfig(language=False))["chars"].to_pylist() == [0, 2]


def test_columns_on_request_have_one_schema() -> None:
    config = SignalsConfig(language=True, pii=True)
    some = measure(build_table(["Write to a.b@c.org, please, and you will hear from us."]), config)
    none = measure(build_table([]), config)
    assert none.schema == some.schema
    assert set(some.column_names) < {*METRICS, *EXTRAS}
    row = some.to_pylist()[0]
    assert (row["language"], row["pii_mails"], row["pii_ips"]) == ("en", 1, 0)


def test_the_classifier_scores_every_row(tmp_path: Path) -> None:
    config = FitConfig(bits=10)
    weights = np.random.default_rng(0).normal(size=1 << config.bits).astype(np.float32)
    fitted = Classifier(weights, 2.0, config, {}, "x")
    fitted.save(tmp_path)
    texts = ["one word", "another few words here", ""]
    found = measure(build_table(texts), SignalsConfig(language=False, classifier=tmp_path))
    assert found["education_score"].type == pa.float32()
    assert found["education_score"].to_pylist() == fitted.score(texts).tolist()
    with pytest.raises(UserError):
        measure(build_table(texts), SignalsConfig(language=False, classifier=tmp_path / "gone"))


def test_stop_words_and_short_lines_are_chosen() -> None:
    config = SignalsConfig(language=False, stop_words=("und", "für"), short_line_chars=3)
    found = measure(build_table(["Und für\nabc\nüüü"]), config).to_pylist()[0]
    assert found["stop_words"] == 2
    assert found["short_line_share"] == np.float32(2 / 3)


@pytest.mark.parametrize("words", [("The",), ("two words",), tuple("ab" * i for i in range(1, 66))])
def test_stop_words_that_cannot_match_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="stop_words"):
        SignalsConfig(stop_words=words)
