"""Thresholds against signals: every rule, every reason, and the sections of the configuration."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest

from raylign.config import QualityConfig, Section, SignalsConfig, UserError
from raylign.data.quality.rules import REASONS, RULES, judge, read_threshold
from raylign.data.quality.signals import COUNTS, EXTRAS, METRICS, measure

SECTIONS = {
    name: next(arg for arg in get_args(field.annotation) if isinstance(arg, type))
    for name, field in QualityConfig.model_fields.items()
    if name != "preset" and field.default is None
}
EVERYTHING = QualityConfig.model_validate(
    {name: {} for name in SECTIONS}
    | {"language": {"allowed": ["en", "de"]}, "blocklist": {"max_bad_word_share": 0.1}}
    | {
        "c4": {
            "min_terminal_line_share": 0.1,
            "max_javascript_line_share": 0.2,
            "max_policy_line_share": 0.3,
        },
        "code": {"max_comment_line_share": 0.9},
    }
)
WHOLE = COUNTS | {"bad_word_count", "url_blocked"}


def as_column(metric: str, values: list[Any]) -> pa.Array:
    if metric == "language":
        return pa.array(values, pa.string())
    if metric == "url_blocked":
        return pa.array([bool(value) for value in values])
    return pa.array(values, pa.int32() if metric in WHOLE else pa.float32())


def good_row(config: QualityConfig) -> dict[str, Any]:
    """A row that meets every threshold, most of them exactly."""
    row: dict[str, Any] = {"language": "de"}
    for rule in RULES:
        threshold = read_threshold(config, rule.key)
        if threshold is None:
            continue
        if rule.metric in row:  # two rules on one metric: what meets the stricter one
            least = ".min_" in f".{rule.key}"
            threshold = (max if least else min)(row[rule.metric], threshold)
        row[rule.metric] = threshold
    return row


def build(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.table({name: as_column(name, [row[name] for row in rows]) for name in rows[0]})


BASIC = QualityConfig(
    min_chars=10,
    max_chars=60,
    min_alpha_share=0.5,
    max_line_repeat_share=0.4,
    max_mean_word_chars=8,
)


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("a good text of words", []),
        ("short", ["too_short"]),
        ("many words " * 9, ["too_long"]),
        ("!!! ??? ... a", ["few_letters"]),
        ("same line\nsame line\nsame line", ["repeated_lines"]),
        ("extraordinarily uncharacteristic", ["long_words"]),
        ("!!!!!!!!!\n!!!!!!!!!", ["few_letters", "repeated_lines", "long_words"]),
        ("???", ["too_short", "few_letters"]),
    ],
)
def test_every_reason_is_given(text: str, reasons: list[str]) -> None:
    table = pa.table({"text": pa.array([text], pa.large_string()), "url": [None]})
    assert judge(measure(table, SignalsConfig(language=False)), BASIC) == [reasons]


def test_values_at_their_thresholds_pass() -> None:
    row = good_row(EVERYTHING)
    row |= {"chars": 80, "words": 50, "mean_word_chars": 3.0}
    assert {rule.metric for rule in RULES} <= set(row)
    assert judge(build([row]), EVERYTHING) == [[]]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.reason)
def test_a_value_beyond_its_threshold_is_the_reason(rule: Any) -> None:
    row = good_row(EVERYTHING) | {"chars": 80, "words": 50, "mean_word_chars": 3.0}
    threshold = read_threshold(EVERYTHING, rule.key)
    beyond = -1 if ".min_" in f".{rule.key}" else 1
    if rule.metric in WHOLE:
        value: Any = threshold + beyond
    else:
        value = np.nextafter(np.float32(threshold), np.float32(beyond * np.inf))
    bad = row | {rule.metric: value}
    (fine, found) = judge(build([row, bad]), EVERYTHING)
    assert fine == [] and rule.reason in found
    # Whatever else is said is about the same metric.
    metrics = {other.reason: other.metric for other in RULES}
    assert {metrics[reason] for reason in found} == {rule.metric}


def test_all_reasons_in_a_fixed_order() -> None:
    row = good_row(EVERYTHING)
    bad = {}
    for rule in RULES:
        bad[rule.metric] = 0 if ".min_" in f".{rule.key}" else 2**20
    bad |= {"url_blocked": True, "language": "fr", "language_confidence": 0.1}
    bad |= {"alpha_share": 0.1, "chars": 1, "words": 1, "mean_word_chars": 99.0}
    (reasons,) = judge(build([row | bad]), EVERYTHING)
    assert reasons == sorted(reasons, key=list(REASONS).index)
    assert set(REASONS) - set(reasons) == {
        "too_long",
        "gopher_many_words",
        "gopher_short_words",
    }


def test_every_key_has_a_reason_and_every_reason_a_key() -> None:
    keys = {
        f"{name}.{key}" if section else name
        for name, field in QualityConfig.model_fields.items()
        if name != "preset"
        for section in [SECTIONS.get(name)]
        for key in (section.model_fields if section and issubclass(section, Section) else [name])
    }
    assert set(REASONS.values()) == keys
    assert len(REASONS) == len(keys)
    assert {rule.metric for rule in RULES} <= {*METRICS, *EXTRAS}


def test_families_are_off_and_null_turns_a_rule_off() -> None:
    table = pa.table({"text": pa.array(["{ short"], pa.large_string()), "url": [None]})
    signals = measure(table, SignalsConfig(language=False))
    assert judge(signals, QualityConfig()) == [["too_short"]]
    assert judge(signals, QualityConfig(c4={})) == [  # type: ignore[arg-type]
        ["too_short", "c4_sentences", "c4_curly_brackets"]
    ]
    relaxed = QualityConfig.model_validate(
        {"min_chars": 0, "c4": {"min_sentences": None, "max_curly_brackets": 1}}
    )
    assert judge(signals, relaxed) == [[]]


def test_presets_and_keys_that_win() -> None:
    web = QualityConfig(preset="web")
    on = {name for name in SECTIONS if getattr(web, name) is not None}
    assert on == {"gopher", "repetition", "c4", "fineweb"}
    assert web.max_chars == QualityConfig().max_chars
    code = QualityConfig(preset="code", max_chars=5)
    assert (code.max_chars, code.max_line_repeat_share) == (5, 1.0)
    assert code.code is not None and code.gopher is None
    own = QualityConfig.model_validate(
        {"preset": "web", "gopher": None, "fineweb": {"max_short_line_share": 0.9}}
    )
    assert own.gopher is None and own.c4 is not None and own.fineweb is not None
    assert own.fineweb.max_short_line_share == 0.9
    assert own.fineweb.min_punctuated_line_share == 0.12
    assert QualityConfig.model_validate(own.model_dump()) == own


@pytest.mark.parametrize(
    ("section", "need"),
    [
        ({"language": {"allowed": ["en"]}}, "quality.language.min_confidence needs the signal"),
        ({"language": {"allowed": ["en"], "min_confidence": None}}, "quality.language.allowed"),
        ({"blocklist": {}}, "give prepare.signals.bad_words"),
        ({"education": {}}, "give prepare.signals.classifier"),
    ],
)
def test_a_rule_without_its_signal_names_key_and_remedy(section: Any, need: str) -> None:
    table = pa.table({"text": pa.array(["a text"], pa.large_string()), "url": [None]})
    signals = measure(table, SignalsConfig(language=False))
    with pytest.raises(UserError, match=need):
        judge(signals, QualityConfig.model_validate(section))


def test_one_blocklist_is_enough() -> None:
    row = good_row(QualityConfig()) | {"chars": 80, "url_blocked": True}
    config = QualityConfig.model_validate({"blocklist": {}})
    assert judge(build([row]), config) == [["blocklist_blocked_urls"]]


def test_rows_do_not_depend_on_their_neighbours() -> None:
    texts = ["word " * n for n in range(60)] + ["{ a. b! c? " * 9, "• x\n" * 30]
    table = pa.table({"text": pa.array(texts, pa.large_string()), "url": [None] * len(texts)})
    signals = measure(table, SignalsConfig(language=False))
    config = QualityConfig(preset="web")
    whole = judge(signals, config)
    assert whole == judge(signals.slice(0, 7), config) + judge(signals.slice(7), config)
    assert len({tuple(reasons) for reasons in whole}) > 3
