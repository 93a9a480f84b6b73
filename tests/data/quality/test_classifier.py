from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raylign.config import UserError
from raylign.config.synthesis import FitConfig
from raylign.data.quality.agreement import calibrate, compare_scores
from raylign.data.quality.classifier import CARD, WEIGHTS, Classifier, _features, fit, load
from raylign.data.words import mix, split_words

SMALL = FitConfig(bits=12)
GOOD = [
    "theorem",
    "proof",
    "explain",
    "because",
    "therefore",
    "example",
    "lesson",
    "energy",
    "cell",
    "history",
]
BAD = ["click", "buy", "cheap", "login", "subscribe", "offer", "casino", "sale", "cart", "winner"]
FILLER = [f"word{n}" for n in range(60)]


def make_documents(count: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Texts whose label 0..5 is how many of every five telling words are good ones."""
    rng = np.random.default_rng(seed)
    texts, labels = [], rng.integers(0, 6, count).astype(float)
    for label in labels:
        good = rng.choice(GOOD, int(label) * 3)
        bad = rng.choice(BAD, int(5 - label) * 3)
        words = [*good, *bad, *rng.choice(FILLER, 30)]
        texts.append(" ".join(rng.permutation(words)))
    return texts, labels


def weigh(config: FitConfig, seed: int = 0) -> Classifier:
    """A classifier of random weights."""
    weights = np.random.default_rng(seed).normal(0, 3, 1 << config.bits).astype(np.float32)
    weights.setflags(write=False)
    return Classifier(weights, 2.0, config, {}, "x")


def score_slowly(text: str, classifier: Classifier) -> float:
    """The definition, with dictionaries."""
    config = classifier.config
    words = [int(h) for h in split_words([text]).hashes]
    features: Counter[int] = Counter()
    for here, word in enumerate(words):
        features[word % (1 << config.bits)] += 1
        if config.ngrams == 2 and here + 1 < len(words):
            pair = (word * 0x9E3779B97F4A7C15 % 2**64) ^ words[here + 1]
            features[int(mix(np.uint64(pair))) % (1 << config.bits)] += 1
    if not features:
        return config.score_range[0]
    log = config.frequency == "log"
    levels = {f: 1 + math.log(n) if log else 1.0 for f, n in features.items()}
    norm = math.sqrt(sum(level**2 for level in levels.values()))
    raw = sum(classifier.weights[f] * level / norm for f, level in levels.items())
    return min(max(raw + classifier.intercept, config.score_range[0]), config.score_range[1])


@pytest.mark.parametrize("ngrams", [1, 2])
@pytest.mark.parametrize("frequency", ["log", "binary"])
def test_scores_are_those_of_the_definition(ngrams: int, frequency: str) -> None:
    config = FitConfig(bits=8, ngrams=ngrams, frequency=frequency, score_range=(-9, 9), threshold=1)
    classifier = weigh(config)
    texts = [*make_documents(20)[0], "", "one", "a a a a b", "Größe, größe! 3+4=7"]
    with np.errstate(over="ignore"):
        expected = [score_slowly(text, classifier) for text in texts]
    np.testing.assert_allclose(classifier.score(texts), expected, atol=1e-5)
    assert len(set(expected)) > 20  # not all clipped


def test_fitting_sees_the_features_that_scoring_sees() -> None:
    config = FitConfig(bits=10, score_range=(-50, 50), threshold=1)
    classifier = weigh(config)
    texts = make_documents(30)[0]
    features = _features(pa.array(texts), config)
    np.testing.assert_allclose(
        np.asarray(features.multiply(features).sum(axis=1)).ravel(), 1.0, atol=1e-5
    )
    np.testing.assert_allclose(
        features @ classifier.weights + 2.0, classifier.score(texts), atol=1e-4
    )


def test_scores_do_not_depend_on_what_comes_together() -> None:
    texts = make_documents(2100)[0]
    classifier = weigh(SMALL)
    whole = classifier.score(texts)
    chunks = pa.chunked_array([pa.array(texts[:3]), pa.array(texts[3:7])])
    np.testing.assert_array_equal(classifier.score(pa.array(texts)), whole)
    np.testing.assert_array_equal(
        classifier.score(pa.array(texts).slice(1500, 99)), whole[1500:1599]
    )
    np.testing.assert_array_equal(classifier.score(texts[300:301]), whole[300:301])
    np.testing.assert_array_equal(classifier.score(chunks), whole[:7])
    assert whole.dtype == np.float32
    assert classifier.score([]).shape == (0,)


def test_a_null_and_a_text_without_words_have_the_lowest_score() -> None:
    scores = weigh(FitConfig(score_range=(1, 5))).score(pa.array([None, " .,", "word"]))
    assert scores[:2].tolist() == [1, 1]
    assert weigh(FitConfig(bits=8)).score(["!"])[0] == 0


def test_what_can_be_learned_is_learned_and_measured_honestly() -> None:
    texts, labels = make_documents(900)
    classifier = fit(texts, labels, SMALL, seed=3)
    fresh, truth = make_documents(400, seed=1)
    scores = classifier.score(fresh)
    assert np.corrcoef(scores, truth)[0, 1] > 0.9
    assert scores.min() >= 0 and scores.max() <= 5
    metrics = classifier.metrics
    assert metrics["labels"] == {"fitted": 720, "calibrated": 90, "held_out": 90}
    # What was reported of 90 held-out labels is what 400 fresh documents show.
    again = compare_scores(scores, truth, 3.0, (0.0, 5.0))
    assert metrics["pearson"] == pytest.approx(again["pearson"], abs=0.05)
    assert metrics["f1"] == pytest.approx(again["f1"], abs=0.08)
    assert np.polyfit(scores, truth, 1)[0] == pytest.approx(1.0, abs=0.15)  # calibrated


def test_labels_without_meaning_are_reported_as_such() -> None:
    texts, labels = make_documents(600)
    shuffled = np.random.default_rng(5).permutation(labels)
    metrics = fit(texts, shuffled, SMALL, seed=0).metrics
    assert abs(metrics["pearson"] or 0.0) < 0.35


def test_fitting_is_a_function_of_documents_settings_and_seed() -> None:
    texts, labels = make_documents(200)
    one, two = (fit(t, labels, SMALL, seed=1) for t in (texts, pa.array(texts)))
    np.testing.assert_array_equal(one.weights, two.weights)
    assert one.content == two.content and one.metrics == two.metrics
    assert fit(texts, labels, SMALL, seed=2).content != one.content
    assert fit(texts, labels, FitConfig(bits=12, ridge=2), seed=1).content != one.content


def test_saved_and_loaded_it_gives_the_same_scores(tmp_path: Path) -> None:
    texts, labels = make_documents(200)
    classifier = fit(texts, labels, SMALL, seed=1)
    classifier.save(tmp_path / "c")
    again = load(tmp_path / "c")
    np.testing.assert_array_equal(again.score(texts), classifier.score(texts))
    assert (again.content, again.metrics) == (classifier.content, classifier.metrics)
    assert again.config == SMALL
    assert load(str(tmp_path / "c")) is again
    # Another classifier under the same path is noticed.
    other = fit(texts, labels, SMALL, seed=9)
    shutil.rmtree(tmp_path / "c")
    other.save(tmp_path / "c")
    assert load(tmp_path / "c").content == other.content


def test_a_missing_or_damaged_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"classifier.json is missing.*jobs.classifier"):
        load(tmp_path)
    texts, labels = make_documents(100)
    fit(texts, labels, SMALL, seed=1).save(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match="not the one that was saved"):
        load(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole[:100])
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"weights.npy is missing"):
        load(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole)
    card = json.loads((tmp_path / CARD).read_text())
    (tmp_path / CARD).write_text(json.dumps(card | {"fit": {"bitts": 3}}))
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("labels", "config", "message"),
    [
        ([1.0, 2.0], FitConfig(), "2 labelled documents are too few"),
        ([1.0] * 80, FitConfig(), "all labels are equal"),
        ([1.0] * 79 + [7.0], FitConfig(), "label 7 of document 79 is outside"),
        ([1.0] * 79 + [math.nan], FitConfig(), "label nan of document 79"),
        ([1.0] * 80, FitConfig(score_range=(0, 1)), "threshold=3"),
        ([1.0] * 80, FitConfig(score_range=(5, 0)), "must rise"),
    ],
)
def test_labels_that_cannot_be_used(labels: list[float], config: FitConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(["some text"] * len(labels), labels, config, seed=0)


def test_the_scale_is_the_least_squares_line() -> None:
    raw = np.array([1.0, 2.0, 3.0])
    assert calibrate(raw, np.array([3.0, 5.0, 7.0])) == (pytest.approx(2.0), pytest.approx(1.0))
    assert calibrate(raw, -raw) == (1.0, 0.0)  # never turned round
    assert calibrate(np.ones(3), raw) == (1.0, 0.0)


def test_agreement_by_hand() -> None:
    scores, labels = np.array([0.5, 3.5, 3.0, 1.0]), np.array([0.0, 4.0, 1.0, 3.0])
    found = compare_scores(scores, labels, 3.0, (0.0, 5.0))
    assert (found["accuracy"], found["precision"], found["recall"], found["f1"]) == (0.5,) * 4
    assert found["mean_absolute_error"] == pytest.approx((0.5 + 0.5 + 2 + 2) / 4)
    assert found["spearman"] == pytest.approx(0.8)  # ranks 1 4 3 2 and 1 4 2 3: 1 - 6*2/60
    assert found["calibration"][0] == {"from": 0.0, "documents": 1, "score": 0.5, "label": 0.0}
    constant = compare_scores(np.zeros(4), labels, 3.0, (0.0, 5.0))
    assert constant["pearson"] is None and constant["precision"] is None and constant["f1"] == 0


def test_equal_values_share_their_rank() -> None:
    found = compare_scores(np.array([1.0, 1.0, 2.0]), np.array([0.0, 0.0, 5.0]), 3.0, (0.0, 5.0))
    assert found["spearman"] == pytest.approx(1.0)
