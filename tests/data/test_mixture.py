from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from raylign.config import MixtureConfig, UserError
from raylign.data.mixture import (
    Documents,
    allocate,
    check_domains,
    chinchilla_tokens,
    mix,
    read_once,
    wanted_shares,
)

NAMES = ("code", "web", "wiki")


def configure(**knobs: Any) -> MixtureConfig:
    return MixtureConfig.model_validate(knobs)


def draw_documents(seed: int = 0, count: int = 400) -> Documents:
    rng = np.random.default_rng(seed)
    return Documents(
        lengths=rng.integers(1, 60, count),
        keys=rng.integers(0, 2**63, count).astype(np.uint64),
        domains=rng.choice(3, count, p=[0.2, 0.7, 0.1]).astype(np.int32),
        names=NAMES,
    )


def test_shares_by_hand() -> None:
    sizes = [100, 900, 0]
    assert wanted_shares(configure(), NAMES, sizes).tolist() == [0.1, 0.9, 0.0]
    # Square roots 10 and 30.
    assert wanted_shares(configure(alpha=0.5), NAMES, sizes).tolist() == [0.25, 0.75, 0.0]
    assert wanted_shares(configure(alpha=0), NAMES, sizes).tolist() == [0.5, 0.5, 0.0]
    weights = {"code": 3, "web": 1, "wiki": 0}
    assert wanted_shares(configure(weights=weights), NAMES, sizes).tolist() == [0.75, 0.25, 0]
    rest = wanted_shares(configure(weights={"wiki": 1, "*": 3}), NAMES, [100, 200, 50])
    np.testing.assert_allclose(rest, [0.25, 0.5, 0.25])


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        # 300 + 600 + 100: found as they are, once each.
        ({}, [300, 600, 100]),
        ({"tokens": 2000}, [600, 1200, 200]),
        ({"alpha": 0, "tokens": 900}, [300, 300, 300]),
        # wiki takes 4 x 100 of its 1000; the 600 left over go to the others, 1:1.
        ({"alpha": 0, "tokens": 3000}, [1200, 1400, 400]),
        # The same with the cap of code at 2 epochs: what it cannot take goes to web alone.
        ({"alpha": 0, "tokens": 3000, "epochs": {"code": [0, 2]}}, [600, 2000, 400]),
        # Least: two epochs of web whatever its weight.
        (
            {"weights": {"code": 1, "web": 0, "wiki": 1}, "tokens": 400},
            [200, 0, 200],
        ),
        (
            {"weights": {"code": 8, "web": 1, "wiki": 1}, "min_epochs": 1, "tokens": 1500},
            [800, 600, 100],
        ),
        # No budget said: the nearest to one epoch that the bounds allow.
        ({"min_epochs": 3}, [900, 1800, 300]),
        ({"max_epochs": 0.5}, [150, 300, 50]),
        ({"chinchilla_params": 100}, [600, 1200, 200]),
    ],
)
def test_allocation_by_hand(knobs: dict[str, Any], expected: list[int]) -> None:
    given = allocate(configure(**knobs), NAMES, [300, 600, 100])
    np.testing.assert_allclose(given.tokens, expected)
    assert given.budget == sum(expected)


@pytest.mark.parametrize("seed", range(20))
def test_allocation_spends_the_budget_within_the_bounds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 10_000, 6)
    names = [f"d{i}" for i in range(6)]
    weights = {name: float(rng.integers(1, 9)) for name in names}
    config = configure(weights=weights, min_epochs=0.3, max_epochs=3, tokens=int(sizes.sum()))
    given = allocate(config, names, sizes)
    assert given.tokens.sum() == pytest.approx(sizes.sum())
    assert (given.tokens >= 0.3 * sizes - 1e-6).all() and (given.tokens <= 3 * sizes + 1e-6).all()
    # Those between their bounds keep the proportions that were asked for.
    free = (given.tokens > 0.3 * sizes + 1e-6) & (given.tokens < 3 * sizes - 1e-6)
    ratios = given.tokens[free] / given.wanted[free]
    np.testing.assert_allclose(ratios, ratios[:1].repeat(free.sum()))
    low, high = given.tokens <= 0.3 * sizes + 1e-6, given.tokens >= 3 * sizes - 1e-6
    if free.any():
        assert (given.tokens[low] >= ratios[0] * given.wanted[low] - 1e-6).all()
        assert (given.tokens[high] <= ratios[0] * given.wanted[high] + 1e-6).all()


def test_every_document_is_read_as_often_as_its_domain() -> None:
    documents = draw_documents()
    config = configure(weights={"code": 2, "web": 1, "wiki": 1}, tokens=9000, max_epochs=9)
    reading = mix(documents, config, 0.1, seed=5)
    assert not set(reading.train.tolist()) & set(reading.validation.tolist())
    times = np.bincount(reading.train, minlength=400)
    longest = documents.lengths.max()
    for d, (name, share) in enumerate({"code": 0.5, "web": 0.25, "wiki": 0.25}.items()):
        own = np.setdiff1d(np.flatnonzero(documents.domains == d), reading.validation)
        size = documents.lengths[own].sum()
        wanted = 9000 * share
        assert set(times[own].tolist()) <= {int(wanted / size), int(wanted / size) + 1}
        tokens = int((times[own] * documents.lengths[own]).sum())
        assert abs(tokens - wanted) <= longest / 2
        told = reading.report["domains"][name]
        assert told["tokens"] == tokens and told["documents"] == times[own].sum()
        assert told["share"] == round(tokens / reading.report["tokens"], 6)
        assert told["wanted_share"] == share
        assert told["epochs"] == round(tokens / size, 6)
        held = documents.lengths[reading.validation][documents.domains[reading.validation] == d]
        assert held.sum() >= 0.1 * (held.sum() + size) > held.sum() - longest
    assert reading.report["budget"] == 9000 and reading.report["redistributed_tokens"] == 0


def test_every_epoch_is_whole_before_the_next_begins() -> None:
    documents = draw_documents()
    reading = mix(documents, configure(tokens=3 * int(documents.lengths.sum())), 0, seed=5)
    for d in range(3):
        own = np.flatnonzero(documents.domains == d)
        stream = reading.train[documents.domains[reading.train] == d].reshape(3, -1)
        assert (np.sort(stream, axis=1) == own).all()
        assert not (stream[0] == stream[1]).all() and not (stream[1] == stream[2]).all()


def test_domains_and_copies_are_spread_over_the_stream() -> None:
    documents = draw_documents(count=4000)
    config = configure(weights={"code": 1, "web": 1, "wiki": 1}, tokens=150_000, max_epochs=9)
    reading = mix(documents, config, 0, seed=1)
    lengths = documents.lengths[reading.train]
    places = np.cumsum(lengths) / lengths.sum()
    for d in range(3):
        own = documents.domains[reading.train] == d
        for tenth in range(10):
            here = own & (places > tenth / 10) & (places <= (tenth + 1) / 10)
            assert lengths[here].sum() == pytest.approx(5000, rel=0.03)
    last: dict[int, float] = {}
    epochs = {d: reading.report["domains"][name]["epochs"] for d, name in enumerate(NAMES)}
    for document, place in zip(reading.train.tolist(), places.tolist(), strict=True):
        if document in last:  # half an epoch apart, but for the length of a few documents
            gap = place - last[document]
            assert gap > 0.48 / epochs[int(documents.domains[document])]
        last[document] = place


def test_a_mixture_depends_on_seed_and_nothing_else() -> None:
    documents = draw_documents()
    config = configure(alpha=0.5, tokens=20_000)
    first, second = (mix(documents, config, 0.05, seed=1) for _ in range(2))
    assert (first.train == second.train).all() and first.report == second.report
    other = mix(documents, config, 0.05, seed=2)
    assert (other.validation == first.validation).all()
    assert not np.array_equal(other.train, first.train)
    # Documents in another order of files are the same stream.
    turned = np.random.default_rng(0).permutation(400)
    moved = Documents(
        documents.lengths[turned], documents.keys[turned], documents.domains[turned], NAMES
    )
    assert (turned[mix(moved, config, 0.05, seed=1).train] == first.train).all()


def test_a_domain_left_out_is_in_neither_split() -> None:
    documents = draw_documents()
    for weights in ({"code": 1, "web": 0, "wiki": 1}, {"code": 1, "wiki": 1, "*": 0}):
        reading = mix(documents, configure(weights=weights), 0.1, seed=0)
        both = np.concatenate([reading.train, reading.validation])
        assert set(documents.domains[both].tolist()) == {0, 2}


def test_small_domains_stay_in_training() -> None:
    documents = Documents(
        np.array([10, 10, 10, 10]), np.array([4, 3, 2, 1], np.uint64), np.array([0, 1, 1, 1]), NAMES
    )
    reading = mix(documents, configure(weights={"code": 1, "*": 1}, tokens=40), 0.5, seed=0)
    assert reading.validation.tolist() == [3, 2]
    assert sorted(reading.train.tolist()) == [0, 0, 1, 1]
    alone = Documents(
        *(x[:1] for x in (documents.lengths, documents.keys, documents.domains)), NAMES
    )
    with pytest.raises(UserError, match="no domain has two documents"):
        mix(alone, configure(), 0.5, seed=0)


def test_without_a_mixture_every_document_once() -> None:
    documents = draw_documents()
    reading = read_once(documents, 0.1)
    order = np.argsort(documents.keys)
    assert (np.concatenate([reading.validation, reading.train]) == order).all()
    held = documents.lengths[reading.validation]
    assert held.sum() >= 0.1 * documents.lengths.sum() > held[:-1].sum()
    assert len(read_once(documents, 0).validation) == 0
    with pytest.raises(UserError, match=r"prepare\.validation_share=1"):
        read_once(documents, 1)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"weights": {"wikki": 1, "*": 1}}, r"no documents of domain 'wikki'; did you mean 'wiki'"),
        ({"weights": {"books": 1, "*": 1}}, r"domain 'books'; it has 'code', 'web', 'wiki'"),
        ({"weights": {"code": 1}}, r"no weight for 'web', 'wiki'; give one"),
        ({"epochs": {"webb": [1, 2]}}, r"mixture\.epochs: .* did you mean 'web'"),
        (
            {"tokens": 10_000_000},
            r"mixture\.tokens=10000000: .* at most 50[\d,]+; raise max_epochs",
        ),
        ({"chinchilla_params": 10_000_000}, r"chinchilla_params=10000000: 200,000,000 tokens"),
        ({"tokens": 10, "min_epochs": 1}, r"allow at least [\d,]+; lower min_epochs"),
    ],
)
def test_mistakes_name_key_and_remedy(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mix(draw_documents(), configure(**knobs), 0, seed=0)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"weights": {"a": 1}, "alpha": 0.5}, "not both"),
        ({"tokens": 1, "chinchilla_params": 1}, "not both"),
        ({"weights": {"a": -1}}, "greater than or equal to 0"),
        ({"weights": {"a": float("inf")}}, "finite"),
        ({"weights": {"a": 0}}, "no domain has a weight above 0"),
        ({"min_epochs": 5}, "more than the most"),
        ({"epochs": {"a": [2, 1]}}, "epochs of 'a'"),
        ({"alpha": 2}, "less than or equal to 1"),
    ],
)
def test_knobs_that_contradict_themselves(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        configure(**knobs)


def test_the_rest_needs_no_names() -> None:
    check_domains(configure(weights={"web": 1, "*": 2}), NAMES)
    check_domains(configure(alpha=0.3), NAMES)


def test_chinchilla() -> None:
    assert chinchilla_tokens(70_000_000_000) == 1_400_000_000_000
