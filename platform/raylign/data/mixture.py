"""The mixture: how often each document of each domain is read, and where in the stream.

Pure functions of what the documents are (length, shuffle key, domain), the knobs and the seed.
Tokens count the `<eos>` that ends a document. Sampling is by whole documents: epoch k of a domain
reads its documents in a shuffled order of its own, and the last epoch ends where the domain has its
tokens, so the achieved shares differ from the wanted by at most half a document.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylign.config import MixtureConfig, UserError
from raylign.config.shards import REST
from raylign.data.packing import scramble
from raylign.runtime import derive_seed

TOKENS_PER_PARAMETER = 20


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """What mixing needs to know of N documents."""

    lengths: np.ndarray
    """int64 [N]: tokens, with `<eos>`."""
    keys: np.ndarray
    """uint64 [N]: `documents.shuffle_key`."""
    domains: np.ndarray
    """int32 [N]: number in `names`."""
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Documents in the order in which the rows hold them."""

    train: np.ndarray
    """int64: number of each document, once for every time that it is read."""
    validation: np.ndarray
    """int64: documents that `train` has none of."""
    report: dict[str, Any]
    """What was wanted and what came of it; JSON."""


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """Tokens for each of D domains, all float64 [D]."""

    wanted: np.ndarray
    """Share of each; sums to 1."""
    least: np.ndarray
    """Tokens at least."""
    most: np.ndarray
    """Tokens at most."""
    tokens: np.ndarray
    """Tokens it is to have."""
    budget: int
    """The sum of `tokens`."""


def chinchilla_tokens(parameters: int) -> int:
    """Training tokens that suit a model's size: about 20 a parameter (Hoffmann et al. 2022)."""
    return TOKENS_PER_PARAMETER * parameters


def check_domains(config: MixtureConfig, names: Iterable[str]) -> None:
    """Raise `UserError` unless the knobs and the corpus name the same domains.

    Knobs may name no domain that has no documents; weights must name every domain, or the rest.
    """
    found = sorted(set(names))
    for knob, given in (("weights", config.weights or {}), ("epochs", config.epochs)):
        for name in given:
            if name in found or (name == REST and knob == "weights"):
                continue
            close = difflib.get_close_matches(name, found, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(
                f"prepare.mixture.{knob}: the corpus has no documents of domain {name!r}; "
                f"{hint}it has {_enumerate(found)}"
            )
    if config.weights is not None and REST not in config.weights:
        silent = [name for name in found if name not in config.weights]
        if silent:
            raise UserError(
                f"prepare.mixture.weights: no weight for {_enumerate(silent)}; give one (0 leaves "
                f"a domain out), or weigh the rest with {REST!r}"
            )


def wanted_shares(
    config: MixtureConfig, names: Sequence[str], tokens: Sequence[int] | np.ndarray
) -> np.ndarray:
    """The share of each domain, float64 [D], summing to 1; `tokens` [D] is what each has.

    Weights as given, the rest's divided by tokens; else p_i ~ n_i^alpha (Conneau et al. 2020),
    with alpha 1 when nothing is said.
    """
    sizes = np.asarray(tokens, np.float64)
    if config.weights is None:
        alpha = 1.0 if config.alpha is None else config.alpha
        shares = np.where(sizes > 0, sizes**alpha, 0.0)
    else:
        rest = np.array([name not in config.weights for name in names])
        shares = np.array([config.weights.get(name, 0.0) for name in names])
        if REST in config.weights and rest.any():
            shares[rest] = config.weights[REST] * sizes[rest] / sizes[rest].sum()
    if not shares.sum() > 0:
        raise UserError("prepare.mixture.weights: no domain of the corpus has a weight above 0")
    return shares / shares.sum()


def allocate(
    config: MixtureConfig, names: Sequence[str], tokens: Sequence[int] | np.ndarray
) -> Allocation:
    """Divide the budget among domains of `tokens` [D] each, within the bounds on their epochs.

    Tokens are clip(c * share, least, most) with the one c that spends the budget, so what a bounded
    domain cannot take goes to the others in proportion to their shares. Raises `UserError` when
    the bounds leave no room for the budget.
    """
    sizes = np.asarray(tokens, np.float64)
    wanted = wanted_shares(config, names, sizes)
    weighed = wanted > 0
    bounds = np.array(
        [config.epochs.get(name, (config.min_epochs, config.max_epochs)) for name in names]
    )
    least, most = np.where(weighed, bounds.T * sizes, 0.0)
    lowest, highest = math.ceil(least.sum() - 1e-6), math.floor(most.sum() + 1e-6)
    if config.tokens is None and config.chinchilla_params is None:
        budget = min(max(int(sizes[weighed].sum()), lowest), highest)
    else:
        budget = config.tokens or chinchilla_tokens(config.chinchilla_params or 0)
    if not lowest <= budget <= highest:
        key = "tokens" if config.tokens else "chinchilla_params"
        few = budget > highest
        raise UserError(
            f"prepare.mixture.{key}={getattr(config, key)}: {budget:,} tokens are wanted, but the "
            f"bounds on epochs allow at {'most' if few else 'least'} "
            f"{highest if few else lowest:,}; "
            f"{'raise max_epochs' if few else 'lower min_epochs'}, or change the budget"
        )
    return Allocation(wanted, least, most, _fill(wanted, least, most, budget), budget)


def _fill(wanted: np.ndarray, least: np.ndarray, most: np.ndarray, budget: float) -> np.ndarray:
    """clip(c * wanted, least, most) summing to `budget`, which lies between the sums of both.

    The sum is linear in c between the points where a domain reaches a bound.
    """
    some = wanted > 0
    bends = np.unique(np.concatenate([least[some] / wanted[some], most[some] / wanted[some]]))
    sums = np.array([np.clip(c * wanted, least, most).sum() for c in bends])
    at = int(np.searchsorted(sums, budget))
    if at == len(bends):  # all are at their most, up to rounding
        return most
    c = bends[at]
    if at and sums[at] > budget:
        c = bends[at - 1] + (c - bends[at - 1]) * (budget - sums[at - 1]) / (
            sums[at] - sums[at - 1]
        )
    return np.clip(c * wanted, least, most)


def read_once(documents: Documents, validation_share: float) -> Reading:
    """Every document once, shuffled; the first of them are validation."""
    order = np.argsort(documents.keys, kind="stable")
    held = _count_held(documents.lengths[order], validation_share)
    if len(order) <= held:
        raise UserError(
            f"prepare.validation_share={validation_share}: {len(order)} documents cannot be split; "
            "give more text, or 0"
        )
    train, validation = order[held:], order[:held]
    return Reading(train, validation, _report(documents, train, validation, None))


def mix(documents: Documents, config: MixtureConfig, validation_share: float, seed: int) -> Reading:
    """Documents as often as the mixture says, every domain spread evenly over the stream.

    Validation holds the first documents of every weighed domain, at least one and never all, and
    is not mixed. Raises `UserError` for knobs that do not fit the corpus.
    """
    check_domains(config, documents.names)
    order = np.argsort(documents.keys, kind="stable")
    members = [order[documents.domains[order] == d] for d in range(len(documents.names))]
    left_out = {name for name, weight in (config.weights or {}).items() if weight == 0}
    if config.weights is not None and config.weights.get(REST) == 0:
        left_out |= set(documents.names) - set(config.weights)
    held = [np.empty(0, np.int64)]
    for d, name in enumerate(documents.names):
        if name in left_out:
            continue
        count = _count_held(documents.lengths[members[d]], validation_share)
        count = min(count, len(members[d]) - 1)
        held.append(members[d][:count])
        members[d] = members[d][count:]
    validation = np.concatenate(held)
    if validation_share > 0 and not len(validation):
        raise UserError(
            f"prepare.validation_share={validation_share}: no domain has two documents; give more "
            "text, or 0"
        )
    sizes = [int(documents.lengths[own].sum()) for own in members]
    given = allocate(config, documents.names, sizes)
    places, copies = [np.empty(0)], [np.empty(0, np.int64)]
    for own, size, target in zip(members, sizes, given.tokens.tolist(), strict=True):
        for chosen, where in _read_domain(documents, own, size, target, seed):
            copies.append(chosen)
            places.append(where)
    flat = np.concatenate(copies)
    train = flat[np.argsort(np.concatenate(places), kind="stable")]
    validation = validation[np.argsort(documents.keys[validation], kind="stable")]
    return Reading(train, validation, _report(documents, train, validation, given))


def _read_domain(
    documents: Documents, own: np.ndarray, size: int, target: float, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each epoch of one domain: its documents in order, and their places in [0, 1).

    `own` [n] are its documents by key. The first half of them stays the first half of every epoch,
    and each half is shuffled anew: the copies of a document are half an epoch apart or more, so
    they meet in a row only where the domain is hardly longer than one.
    """
    if not len(own) or target <= 0:
        return
    whole = int(target / size + 1e-9)
    epochs: list[np.ndarray] = []
    for epoch in range(whole + 1):
        keys = documents.keys[own]
        if epoch:
            keys = scramble(keys, derive_seed(seed, "epoch", epoch))
        half = len(own) // 2
        order = own[np.lexsort((keys, np.arange(len(own)) >= half))]
        if epoch == whole:
            ends = np.cumsum(documents.lengths[order])
            count = _nearest(ends, target - whole * size)
            order = order[: count if whole else max(1, count)]
        epochs.append(order)
    total = sum(int(documents.lengths[order].sum()) for order in epochs)
    for epoch, order in enumerate(epochs):
        lengths = documents.lengths[order]
        # Somewhere in the room it takes, the same in every epoch: domains do not march in step.
        shift = (scramble(documents.keys[order], 0) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        yield order, (epoch * size + np.cumsum(lengths) - lengths + shift * lengths) / total


def _nearest(ends: np.ndarray, target: float) -> int:
    """How many items to take for a sum nearest to `target`; `ends` [n] are cumulative sums."""
    ends = np.concatenate([[0], ends])
    return int(np.argmin(np.abs(ends - target)))


def _count_held(lengths: np.ndarray, share: float) -> int:
    """The fewest documents, taken in order, that hold `share` of the tokens."""
    if share <= 0:
        return 0
    return int(np.searchsorted(np.cumsum(lengths), share * int(lengths.sum()))) + 1


def _report(
    documents: Documents, train: np.ndarray, validation: np.ndarray, given: Allocation | None
) -> dict[str, Any]:
    count = len(documents.names)

    def tally(chosen: np.ndarray) -> tuple[list[int], list[int]]:
        """Documents and tokens of each domain."""
        codes = documents.domains[chosen]
        tokens = np.zeros(count, np.int64)
        np.add.at(tokens, codes, documents.lengths[chosen])
        return np.bincount(codes, minlength=count).tolist(), tokens.tolist()

    distinct = np.ones(len(documents.lengths), bool)
    distinct[validation] = False
    available, available_tokens = tally(np.flatnonzero(distinct))
    read, read_tokens = tally(train)
    held, held_tokens = tally(validation)
    total = sum(read_tokens)
    domains: dict[str, dict[str, Any]] = {}
    for d, name in enumerate(documents.names):
        domains[name] = {
            "wanted_share": None if given is None else round(float(given.wanted[d]), 6),
            "share": round(read_tokens[d] / total, 6) if total else 0.0,
            "tokens": read_tokens[d],
            "documents": read[d],
            "epochs": round(read_tokens[d] / max(1, available_tokens[d]), 6),
            "available_tokens": available_tokens[d],
            "available_documents": available[d],
            "validation_tokens": held_tokens[d],
            "validation_documents": held[d],
            "bound": None if given is None else _name_bound(given, d),
        }
    report: dict[str, Any] = {"tokens": total, "domains": domains}
    if given is not None:
        short = np.clip(given.budget * given.wanted - given.tokens, 0, None)
        report |= {"budget": given.budget, "redistributed_tokens": round(float(short.sum()))}
    return report


def _name_bound(given: Allocation, domain: int) -> str | None:
    """Which bound keeps a domain from its wanted share."""
    ideal = given.budget * given.wanted[domain]
    if ideal > given.most[domain] * (1 + 1e-9):
        return "max_epochs"
    return "min_epochs" if ideal < given.least[domain] * (1 - 1e-9) else None


def _enumerate(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(map(repr, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
