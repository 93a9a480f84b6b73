"""Differences are paired, and their errors are those of the documents' own changes."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from raylign.evaluation.pairing import compare_models, pair_differences, pick_answers
from raylign.evaluation.uncertainty import measure_mean, measure_ratio


def document(right: float, question: str = "q", bits: tuple[float, float] | None = None) -> dict:
    return {
        "doc": {"prompt": question, "reference": "1"},
        "answer": "1" if right else "2",
        "scores": {"exact": right},
        "likelihoods": {} if bits is None else {"bits_per_byte": list(bits)},
    }


def test_mean_and_error() -> None:
    values = [0.0, 1.0, 1.0, 1.0]
    assert measure_mean(values) == pytest.approx((0.75, statistics.stdev(values) / 2))
    assert measure_mean([3.0]) == (3.0, None)


def test_ratio_of_equal_weights_is_the_mean() -> None:
    values = [0.5, 2.0, 3.5]
    assert measure_ratio([(v, 1.0) for v in values]) == pytest.approx(measure_mean(values))
    # Weighted: (2 + 6) / (1 + 3), and no spread where every document has the same quotient.
    assert measure_ratio([(2.0, 1.0), (6.0, 3.0)]) == pytest.approx((2.0, 0.0))


def test_differences_are_paired() -> None:
    before = [document(r) for r in (0, 0, 1, 1, 0, 1)]
    after = [document(r) for r in (1, 1, 1, 0, 0, 1)]
    found = pair_differences(before, after)["exact"]
    changes = [1, 1, 0, -1, 0, 0]
    assert found["value"] == pytest.approx(1 / 6)
    assert found["stderr"] == pytest.approx(statistics.stdev(changes) / math.sqrt(6))
    assert (found["gained"], found["lost"], found["n"]) == (2, 1, 6)


def test_bits_per_byte_fall_when_likelihood_rises() -> None:
    before = [document(0, bits=(-10.0, 5.0)), document(0, bits=(-20.0, 10.0))]
    after = [document(0, bits=(-5.0, 5.0)), document(0, bits=(-10.0, 10.0))]
    found = pair_differences(before, after)["bits_per_byte"]
    assert found["value"] == pytest.approx(-1.0 / math.log(2))
    assert found["stderr"] == pytest.approx(0.0)


def test_answers_prefer_disagreement_and_keep_order() -> None:
    rights = {"a": (1, 1, 0, 1), "b": (1, 0, 0, 0)}
    documents = {m: [document(r, f"q{i}") for i, r in enumerate(v)] for m, v in rights.items()}
    found = pick_answers(documents, count=3)
    assert [row["question"] for row in found["a"]] == ["q0", "q1", "q3"]
    assert [row["correct"] for row in found["b"]] == [True, False, False]
    assert pick_answers({"a": [], "b": documents["b"]}) == {}


def test_models_keep_their_order_and_lacking_metrics_stay_absent() -> None:
    def results(value: float, metrics: tuple[str, ...]) -> dict[str, Any]:
        scores = {m: {"value": value, "stderr": 0.1, "n": 2} for m in metrics}
        return {
            "metrics": {"arithmetic": scores},
            "higher_is_better": {"arithmetic": {"exact": True}},
            "documents": {"arithmetic": [document(value), document(value)]},
        }

    found = compare_models({"z": results(0, ("exact",)), "a": results(1, ("exact", "format"))})
    assert found["models"] == ["z", "a"]
    metric = found["tasks"]["arithmetic"]["metric"]
    assert list(metric["exact"]) == ["z", "a"] and list(metric["format"]) == ["a"]
    [difference] = found["differences"]
    assert (difference["from"], difference["to"], difference["value"]) == ("z", "a", 1.0)
