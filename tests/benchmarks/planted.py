"""A corpus with near-duplicates whose origins are known: `planted.py DIRECTORY DOCUMENTS`.

Texts are bigram chains over the prose that ships with Python, so word frequencies are natural and
two documents that were not planted as relatives share few word 5-grams. 30 % of the documents are
copies of another one: wrapped anew, with words substituted, cut short, or with boilerplate of one
of 64 sites added; how much of a copy remains is drawn from 0.35 to 0.99 (Jaccard similarity).
Clusters have Zipf sizes, and one holds 0.2 % of all documents.

Every document is a function of the seed and its number alone. The words are those of the running
Python, so another minor version makes another corpus. `part-*.parquet` have `doc_id` (its second
half is the document's number) and `text`; `truth.parquet` names the `base` of each copied
`document`, the `kind` of copy and the intended similarity.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raylign.data.words import kernel, mix

PART = 6250
COPIES = 0.3
LARGEST = 0.002
MEDIAN_WORDS, SPREAD, FEWEST, MOST = 165, 0.6, 30, 2000
KINDS = ("wrapped", "substituted", "truncated", "boilerplate")
SHARES = (0.2, 0.4, 0.2, 0.2)
_ORIGINAL, _SUBSTITUTED, _TRUNCATED, _BOILERPLATE = -1, 1, 2, 3
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]{0,16}[.,;:!?]?")
_QUOTED = re.compile(r'"""(.*?)"""', re.DOTALL)
_PROSE = re.compile(r"(?<!\S)(?:[A-Za-z][A-Za-z'-]{0,16}[.,;:!?]?\s+){5,}")


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """V words, and which follow which in W words of prose."""

    data: np.ndarray
    """uint8: the words' bytes, one after the other."""
    bounds: np.ndarray
    """int64 [V + 1]: word v has the bytes bounds[v]..bounds[v + 1]."""
    prose: np.ndarray
    """int32 [W]: a random entry is a word by its frequency."""
    followers: np.ndarray
    """int32 [W]: of word v those at first[v]..first[v + 1]."""
    first: np.ndarray
    """int64 [V + 1]"""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What each of N documents is made from."""

    base: np.ndarray
    """int64 [N]: the document it is a copy of; itself when it is none."""
    kind: np.ndarray
    """int8 [N]: position in `KINDS`, or -1."""
    similarity: np.ndarray
    """float64 [N]: intended Jaccard similarity to the base."""
    words: np.ndarray
    """int64 [N]: length, before what a copy changes."""


def learn_chain() -> Chain:
    """The chain of Python's manual pages and of the doc strings of its library."""
    from pydoc_data import topics

    texts = [topics.topics[name] for name in sorted(topics.topics)]
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        texts += _QUOTED.findall(file.read_text(encoding="utf-8", errors="replace"))
    numbers: dict[str, int] = {}
    found = [
        numbers.setdefault(word, len(numbers))
        for text in texts
        for passage in _PROSE.findall(text)
        for word in _WORD.findall(passage)
    ]
    prose = np.array(found, np.int32)
    order = np.argsort(prose[:-1], kind="stable")
    lengths = [len(word) for word in numbers]
    return Chain(
        data=np.frombuffer("".join(numbers).encode(), np.uint8),
        bounds=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prose=prose,
        followers=prose[1:][order],
        first=np.searchsorted(prose[:-1][order], np.arange(len(numbers) + 1)),
    )


def plan_documents(documents: int, seed: int = 0) -> Plan:
    """Which documents are copies of which, and how far they are from them."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(documents)
    copies = int(documents * COPIES)
    sizes = [min(copies, max(2, int(documents * LARGEST)))]
    left = copies - sizes[0]
    while left:
        sizes.append(int(min(left, rng.zipf(2.0), max(3, documents // 2000))))
        left -= sizes[-1]
    # The first documents of the shuffled order are the bases that have copies.
    base = np.arange(documents)
    base[shuffled[documents - copies :]] = np.repeat(shuffled[: len(sizes)], sizes)
    copied = base != np.arange(documents)
    kind = np.where(copied, rng.choice(len(KINDS), documents, p=SHARES), _ORIGINAL)
    similarity = np.where(kind >= _SUBSTITUTED, rng.uniform(0.35, 0.99, documents), 1.0)
    words = np.exp(rng.normal(np.log(MEDIAN_WORDS), SPREAD, documents))
    words = np.clip(words, FEWEST, MOST).astype(np.int64)[base]
    return Plan(base, kind.astype(np.int8), similarity, words)


def write_texts(chain: Chain, plan: Plan, start: int, stop: int, seed: int = 0) -> pa.Array:
    """Texts of the documents start..stop."""
    longest = int(np.diff(chain.bounds).max()) + 2
    room = int((plan.words[start:stop] / np.minimum(1, plan.similarity[start:stop]) + 2).sum())
    data = np.empty(room * longest, np.uint8)
    offsets = np.zeros(stop - start + 1, np.int64)
    tokens = np.empty(3 * MOST + 3, np.int32)
    _write(
        *(chain.data, chain.bounds, chain.prose, chain.followers, chain.first),
        *(plan.base, plan.kind, plan.similarity, plan.words),
        *(np.uint64(seed), start, tokens, data, offsets),
    )
    return pa.LargeStringArray.from_buffers(
        stop - start, pa.py_buffer(offsets), pa.py_buffer(data[: offsets[-1]].copy())
    )


def write_corpus(directory: Path, documents: int, seed: int = 0) -> int:
    """Write the corpus unless it is there; returns its bytes of text."""
    total_file = directory / "bytes"
    if total_file.exists():
        return int(total_file.read_text())
    directory.mkdir(parents=True, exist_ok=True)
    chain, plan, total = learn_chain(), plan_documents(documents, seed), 0
    halves = _scramble(documents, np.uint64(seed))
    for number, start in enumerate(range(0, documents, PART)):
        stop = min(start + PART, documents)
        texts = write_texts(chain, plan, start, stop, seed)
        ids = [f"{halves[row]:016x}{row:016x}" for row in range(start, stop)]
        table = pa.table({"doc_id": ids, "text": texts})
        pq.write_table(table, directory / f"part-{number:06d}.parquet", compression="zstd")
        total += pc.sum(pc.binary_length(texts)).as_py()
    copies = np.flatnonzero(plan.kind != _ORIGINAL)
    truth = {
        "document": copies,
        "base": plan.base[copies],
        "kind": pa.array(np.array(KINDS)[plan.kind[copies]]),
        "similarity": plan.similarity[copies],
    }
    pq.write_table(pa.table(truth), directory / "truth.parquet", compression="zstd")
    total_file.write_text(str(total))
    return total


@kernel
def _scramble(documents, seed):
    halves = np.empty(documents, np.uint64)
    for row in range(documents):
        halves[row] = mix(mix(seed + np.uint64(1)) ^ np.uint64(row))
    return halves


@kernel
def _draw(state, bound):
    """The next state, and a number below `bound`."""
    state += np.uint64(0x9E3779B97F4A7C15)
    return state, np.int64((mix(state) >> np.uint64(33)) % np.uint64(bound))


@kernel
def _fill(tokens, start, count, state, prose, followers, first):
    """Write `count` words of the chain; every fourth or so is unrelated to the one before."""
    state, at = _draw(state, len(prose))
    word = prose[at]
    for i in range(start, start + count):
        tokens[i] = word
        choices = first[word + 1] - first[word]
        state, jump = _draw(state, 4)
        if jump == 0 or choices == 0:
            state, at = _draw(state, len(prose))
            word = prose[at]
        else:
            state, at = _draw(state, choices)
            word = followers[first[word] + at]


@kernel
def _change(tokens, count, kind, similarity, state, prose, followers, first):
    """Turn a base into a copy; returns its length."""
    if kind == 1:
        # J = q / (2 - q) when a share q of the n-grams stays, and q = (1 - p)^5.
        odds = 1.0 - (2.0 * similarity / (1.0 + similarity)) ** 0.2
        for i in range(count):
            state, chance = _draw(state, 1 << 30)
            if chance < odds * (1 << 30):
                state, at = _draw(state, len(prose))
                tokens[i] = prose[at]
    elif kind == 2:
        return max(20, int(count * similarity))
    elif kind == 3:
        extra = max(1, int(count * (1.0 / similarity - 1.0)))
        state, site = _draw(state, 64)
        state, in_front = _draw(state, 2)
        at = count
        if in_front:
            at = 0
            for i in range(count - 1, -1, -1):
                tokens[i + extra] = tokens[i]
        _fill(tokens, at, extra, mix(np.uint64(0x626F696C + site)), prose, followers, first)
        return count + extra
    return count


@kernel
def _render(tokens, count, state, words, bounds, data, used):
    """Write the words with blanks and line ends; returns the bytes used."""
    state, width = _draw(state, 60)
    width = 60 + width if width < 45 else 1 << 30  # a quarter of the documents is not wrapped
    column = 0
    for i in range(count):
        low, high = bounds[tokens[i]], bounds[tokens[i] + 1]
        if i:
            state, end = _draw(state, 80)
            if end == 0:
                data[used], data[used + 1], used, column = 10, 10, used + 2, 0
            elif column + high - low >= width:
                data[used], used, column = 10, used + 1, 0
            else:
                data[used], used, column = 32, used + 1, column + 1
        for byte in range(low, high):
            data[used] = words[byte]
            used += 1
        column += high - low
    return used


@kernel
def _write(
    words,
    bounds,
    prose,
    followers,
    first,
    base,
    kinds,
    similarity,
    lengths,
    seed,
    start,
    tokens,
    data,
    offsets,
):
    used = 0
    for i in range(len(offsets) - 1):
        row = start + i
        count = lengths[row]
        origin = mix(seed * np.uint64(0x2545F4914F6CDD1D) ^ mix(np.uint64(base[row])))
        _fill(tokens, 0, count, origin, prose, followers, first)
        own = mix(origin ^ mix(np.uint64(row + 1)))
        count = _change(tokens, count, kinds[row], similarity[row], own, prose, followers, first)
        used = _render(tokens, count, mix(own), words, bounds, data, used)
        offsets[i + 1] = used


if __name__ == "__main__":
    size = write_corpus(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.write(f"{size:,} bytes of text\n")
